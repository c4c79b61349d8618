"""Soaks: long runs of mixed requests."""

from __future__ import annotations

from tools.tables.common import load, table


def soak(name: str, engine: str, paused: str) -> str:
    """A recorded soak.

    Args:
        name: the result file's name without ".json".
        engine: the engine's name; in lower case, the key of its version.
        paused: the engine's word for requests that wait for memory in mid-text.
    """
    record = load(name)
    row = [
        f"{record['device']}, {engine} {record['versions'][engine.lower()]}",
        *(f"{record[key]:,}" for key in ("steps", "finished", "aborted", paused)),
        f"{record['prefix_hits']:,}",
        f"{len(record['mismatches'])}",
        f"{record['growth_mb']['resident_mb']:+.0f} MB",
    ]
    header = ["on", "steps", "finished", "aborted", paused, "cached tokens hit"]
    return table([*header, "texts that differ", "growth, last third"], [row])
