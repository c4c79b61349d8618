"""Prompt sets by file, or by name from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt, load_prompts

CACHE = Path.home() / ".cache" / "dflash-plugin" / "prompts"


class HubSet(NamedTuple):
    """Where a set is on the hub: the same as PyPI dflash 0.1.0's benchmark takes."""

    arguments: tuple[str, ...]
    split: str
    field: str
    ours: str


HUB = {
    "gsm8k": HubSet(("openai/gsm8k", "main"), "test", "question", "question"),
    "math500": HubSet(("HuggingFaceH4/MATH-500",), "test", "problem", "question"),
    "humaneval": HubSet(("openai/openai_humaneval",), "test", "prompt", "prompt"),
    "mbpp": HubSet(("google-research-datasets/mbpp", "sanitized"), "test", "prompt", "prompt"),
    "mt_bench": HubSet(("HuggingFaceH4/mt_bench_prompts",), "train", "prompt", "turns"),
}


def load_sets(data: Sequence[str], limit: int | None) -> dict[str, list[Prompt]]:
    """Prompts of each set, with all their turns, by the set's name.

    Args:
        data: JSONL files, or names of ``HUB``.
        limit: prompts of each set, None for all.

    Raises:
        DFlashError: neither a file nor a name, an empty or malformed file, two of one name.
    """
    if not data:
        raise DFlashError(f"no prompts: give --data FILE.jsonl or one of {', '.join(HUB)}")
    sets: dict[str, list[Prompt]] = {}
    for one in data:
        path = Path(one)
        if not path.is_file() and one in HUB:
            path = fetch(one)
        elif not path.is_file():
            raise DFlashError(
                f"--data {one!r} is neither a file nor one of {', '.join(HUB)}: give a JSONL file "
                "of prompts"
            )
        prompts = load_prompts(path, limit, turns="all")
        name = prompts[0].set_name
        if name in sets:
            raise DFlashError(f"--data {one!r} is a second set named {name!r}: rename the file")
        sets[name] = prompts
    return sets


def fetch(name: str, cache: Path = CACHE, download: Callable[..., Any] | None = None) -> Path:
    """A set of the hub as a JSONL file, downloaded once.

    Args:
        name: of ``HUB``.
        cache: directory of the file.
        download: ``datasets.load_dataset``.

    Raises:
        DFlashError: ``datasets`` is not installed, or the hub is out of reach.
    """
    path = cache / f"{name}.jsonl"
    if path.is_file():
        return path
    source = HUB[name]
    advice = f"download {source.arguments[0]} elsewhere and give it as --data FILE.jsonl"
    if download is None:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DFlashError(
                f"--data {name} needs the package datasets: pip install datasets, or {advice}"
            ) from error
        download = load_dataset
    try:
        rows = [
            {source.ours: row[source.field]}
            for row in download(*source.arguments, split=source.split)
        ]
    except Exception as error:
        raise DFlashError(f"--data {name} cannot be downloaded ({error}): {advice}") from error
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    return path
