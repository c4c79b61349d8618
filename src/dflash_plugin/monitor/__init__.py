"""Clients of a running server: HTTP, metrics, and ``dflash-plugin top``."""
