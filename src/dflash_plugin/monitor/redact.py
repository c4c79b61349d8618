"""Keeps credentials out of records."""

from __future__ import annotations

import re
from typing import Any

SECRETS = ("api_key", "password", "secret", "hf_token", "_keyfile", "credential")
OFF: tuple[Any, ...] = (None, False, "", [], {})


def without_credentials(text: str) -> str:
    """A URL or command line without user, password and keys."""
    text = re.sub(r"(https?://)[^/@\s]+@", r"\1", text)
    return re.sub(r"(--[\w-]*(?:api-key|hf-token|password|secret)[= ]+)[^\s'\"]+", r"\1…", text)


def without_secrets(flags: Any) -> Any:
    """Settings of a server that are on, without those that grant access."""
    if isinstance(flags, dict):
        return {
            key: without_secrets(value)
            for key, value in flags.items()
            if value not in OFF and not any(word in str(key).lower() for word in SECRETS)
        }
    if isinstance(flags, list):
        return [without_secrets(value) for value in flags]
    return without_credentials(flags) if isinstance(flags, str) else flags
