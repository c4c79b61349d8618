"""Compares adaptive policies on recorded traces and given step times; no engine imports it."""
