"""Where results lie, how they are loaded, and what all tables are made of."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict:
    """A recorded result.

    Recorded commands name full prompt sets by a path outside the repository; tables name the files
    alone, and the pages say where the sets come from.
    """
    text = (RESULTS / f"{name}.json").read_text()
    return json.loads(text.replace("../shared/data/", ""))


def runs_of(name: str) -> list[dict]:
    """The records of a serving result: one file may join several runs."""
    record = load(name)
    return record.get("runs", [record])


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").is_file()


def not_measured(name: str) -> str:
    return f"Not measured yet: this table is made from `benchmarks/results/{name}.json`."


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(record: dict) -> str:
    return (
        f"{record['device']}, {record['dtype']}, torch {record['torch']}, Transformers "
        f"{record['transformers']}, {record['date']}"
    )


def versions_of(record: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def commands_of(runs: list[dict]) -> str:
    return "; ".join(f"`{run['command']}`" for run in runs)
