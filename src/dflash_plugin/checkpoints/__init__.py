"""Checkpoints: read every dialect, write, convert, inspect, fetch; reference drafts."""
