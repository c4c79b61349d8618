"""Functions that write rows of the table."""

from __future__ import annotations

from dflash_plugin.serving.engine_surface import Kind, Seam

WORKER = "speculative.dflash_worker_v2"


def rows(
    module: str,
    kind: Kind,
    feature: str,
    why: str,
    *symbols: str,
    signature: tuple[str, ...] | None = None,
    since: str = "",
    until: str = "",
) -> tuple[Seam, ...]:
    """Rows of the table that differ in the symbol alone."""
    return tuple(
        Seam(f"sglang.srt.{module}", symbol, kind, feature, why, signature, since, until)
        for symbol in symbols
    )


def members(owner: str, *names: str) -> tuple[str, ...]:
    """Symbols of members of a class."""
    return tuple(f"{owner}.{name}" for name in names)
