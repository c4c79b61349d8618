"""What each engine does with each family of targets."""

from __future__ import annotations

import re

from tools.tables.common import load, measured, table

# Engines and runners in the order of the table of targets; every family has an entry for each.
TARGET_COLUMNS = {
    "transformers": "Transformers",
    "vllm_v1": "vLLM V1",
    "vllm_v2": "vLLM V2",
    "sglang": "SGLang",
}
# Some of the families on a GPU, and the titles of their columns by engine.
ON_GPU = "targets-h200"
GPU_COLUMNS = {"vllm": "vLLM on a GPU", "sglang": "SGLang on a GPU"}
# A family that was not run there.
NOT_RUN = {"text": ""}


def on_gpu() -> dict:
    """What was seen on a GPU, or a record of nothing; the engines in the table's order."""
    record = load(ON_GPU) if measured(ON_GPU) else {"engines": {}, "families": []}
    engines = {name: record["engines"][name] for name in GPU_COLUMNS if name in record["engines"]}
    return {**record, "engines": engines}


def seen_on_gpu(record: dict) -> dict[str, dict[str, dict]]:
    """The entries of each family of the table on a GPU, by engine; of engines that ran there."""
    rows = {row["family"]: row for row in record["families"]}
    return {
        name: {engine: rows.get(name, {}).get(engine, NOT_RUN) for engine in record["engines"]}
        for name in (row["family"] for row in load("targets")["families"])
    }


def gpu_cell(found: dict) -> str:
    """An entry of a family on a GPU: the outcome, on which back end, and what stood in."""
    attention = f"`{found['attention']}`" if found.get("attention") else ""
    parts = filter(None, (found["text"], attention, found.get("stands_in")))
    return "; ".join(parts)


def targets() -> str:
    """What each engine does with each family of targets."""
    record, gpu = load("targets"), on_gpu()
    seen = seen_on_gpu(gpu)
    rows = [
        [
            row["family"],
            f"`{row['model_type']}`",
            row["trait"],
            *(row[column]["text"] for column in TARGET_COLUMNS),
            *(gpu_cell(found) for found in seen[row["family"]].values()),
        ]
        for row in record["families"]
    ]
    titles = [GPU_COLUMNS[engine] for engine in gpu["engines"]]
    header = ["family", "model type", "what is special", *TARGET_COLUMNS.values(), *titles]
    versions = dict.fromkeys(record["versions"][column] for column in TARGET_COLUMNS)
    there = [
        f"Seen on {run['device']}, {run['date']}: {run['versions']}"
        for run in gpu["engines"].values()
    ]
    return f"{table(header, rows)}\n\n{'; '.join(versions)}. {'. '.join([*there, ''])}".strip()


def refusals() -> str:
    """Why a family is refused, in the engine's words, without numbers that change."""
    seen = seen_on_gpu(on_gpu())
    rows = [
        [row["family"], title, re.sub(r"relative difference [\d.e-]+; ", "", message)]
        for row in load("targets")["families"]
        for title, found in (
            *((title, row[column]) for column, title in TARGET_COLUMNS.items()),
            *((GPU_COLUMNS[engine], found) for engine, found in seen[row["family"]].items()),
        )
        if (message := found.get("message"))
    ]
    return table(["family", "engine", "refusal"], rows)
