"""How a measured server speculates, in words: from its flags, or from how it was started."""

from __future__ import annotations

import re

from dflash_plugin.bench.schema import Server

# The drafter in the command that started a server, as an option or within --speculative-config.
DRAFTER_OPTION = re.compile(r"--speculative-(?:draft-)?model(?:-path)?[= ]+['\"]?([^\s'\"]+)")
DRAFTER_IN_CONFIG = re.compile(r"--speculative-config.*?\"model\"\s*:\s*\"([^\"]+)\"")
METHOD_OPTION = re.compile(r"--speculative-(?:method|algorithm)[= ]+['\"]?([^\s'\"]+)")
METHOD_IN_CONFIG = re.compile(r"--speculative-config.*?\"method\"\s*:\s*\"([^\"]+)\"")


def drafter_of(server: Server) -> str | None:
    """The drafter's directory or name, from how the server runs; None where that is not told."""
    flags = server.flags
    if isinstance(flags, str):
        found = DRAFTER_OPTION.search(flags) or DRAFTER_IN_CONFIG.search(flags)
        return found[1] if found else None
    if not flags:
        return None
    speculative = flags.get("speculative_config")
    if isinstance(speculative, dict) and speculative.get("model"):
        return str(speculative["model"])
    named = flags.get("speculative_draft_model_path") or flags.get("drafter")
    return str(named) if named else None


def method_of(server: Server) -> str | None:
    """What the engine calls its method, like dflash, ngram or EAGLE3; None where it is not told."""
    flags = server.flags
    if isinstance(flags, str):
        found = METHOD_OPTION.search(flags) or METHOD_IN_CONFIG.search(flags)
        return found[1] if found else None
    if not flags:
        return None
    speculative = flags.get("speculative_config")
    if isinstance(speculative, dict) and speculative.get("method"):
        return str(speculative["method"])
    named = flags.get("speculative_algorithm")
    return str(named) if named else None


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
