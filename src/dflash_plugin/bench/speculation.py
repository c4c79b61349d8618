"""How a measured server speculates, in words: from its flags, or from how it was started."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dflash_plugin.bench.schema import Server

# The drafter in the command that started a server, as an option or within --speculative-config.
DRAFTER_OPTION = re.compile(r"--speculative-(?:draft-)?model(?:-path)?[= ]+['\"]?([^\s'\"]+)")
DRAFTER_IN_CONFIG = re.compile(r"--speculative-config.*?\"model\"\s*:\s*\"([^\"]+)\"")
METHOD_OPTION = re.compile(r"--speculative-(?:method|algorithm)[= ]+['\"]?([^\s'\"]+)")
METHOD_IN_CONFIG = re.compile(r"--speculative-config.*?\"method\"\s*:\s*\"([^\"]+)\"")


def drafter_of(server: Server) -> str | None:
    """The drafter's directory or name, from how the server runs; None where that is not told."""
    names = ("speculative_draft_model_path", "drafter")
    return _told(server, (DRAFTER_OPTION, DRAFTER_IN_CONFIG), "model", names)


def method_of(server: Server) -> str | None:
    """What the engine calls its method, like dflash, ngram or EAGLE3; None where it is not told."""
    names = ("speculative_algorithm",)
    return _told(server, (METHOD_OPTION, METHOD_IN_CONFIG), "method", names)


def _told(
    server: Server, in_command: Sequence[re.Pattern[str]], key: str, names: Sequence[str]
) -> str | None:
    """A setting of a server: of its command, else of its flags.

    Args:
        server: tells how it runs.
        in_command: patterns whose first group is the setting, in order.
        key: of vLLM's speculative configuration.
        names: of flags beside it, in order.
    """
    flags = server.flags
    if isinstance(flags, str):
        matches = (pattern.search(flags) for pattern in in_command)
        return next((match[1] for match in matches if match), None)
    if not flags:
        return None
    speculative = flags.get("speculative_config")
    configured = speculative.get(key) if isinstance(speculative, dict) else None
    found = next(filter(None, (configured, *map(flags.get, names))), None)
    return None if found is None else str(found)


def pair_of(server: Server) -> str:
    """The target and what drafts for it, by name."""
    target = _last_part(server.model)
    if server.speculative is False:
        return f"{target} without a drafter"
    drafter, method = drafter_of(server), method_of(server)
    # vLLM names the target as the model of a method that has none.
    if drafter and drafter != server.model:
        name = f"drafter {_last_part(drafter)}"
        drafts = name if not method or method.lower() == "dflash" else f"{name} ({method})"
    elif method:
        drafts = f"{method} drafts"
    else:
        drafts = "drafter (name untold)" if server.speculative else "or without drafts (untold)"
    uncounted = ", which it does not count" if server.speculative is None and method else ""
    return f"{target} with {drafts}{uncounted}"


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
