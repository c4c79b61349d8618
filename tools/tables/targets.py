"""What each engine does with each family of targets."""

from __future__ import annotations

import re

from tools.tables.common import load, table

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
NOT_RUN = {"text": "still to be run"}


def gpu_cell(found: dict) -> str:
    """An entry of a family on a GPU: the outcome, on which back end, and what stood in."""
    attention = f"`{found['attention']}`" if found.get("attention") else ""
    parts = filter(None, (found["text"], attention, found.get("stands_in")))
    return "; ".join(parts)


def targets() -> str:
    """What each engine does with each family of targets on a CPU."""
    record = load("targets")
    rows = [
        [
            row["family"],
            f"`{row['model_type']}`",
            row["trait"],
            *(row[column]["text"] for column in TARGET_COLUMNS),
        ]
        for row in record["families"]
    ]
    header = ["family", "model type", "what is special", *TARGET_COLUMNS.values()]
    versions = dict.fromkeys(record["versions"][column] for column in TARGET_COLUMNS)
    return f"{table(header, rows)}\n\n{'; '.join(versions)}."


def targets_on_gpu() -> str:
    """What both engines do with those families that run on a GPU."""
    record = load(ON_GPU)
    rows = [
        [row["family"], *(gpu_cell(row.get(engine, NOT_RUN)) for engine in GPU_COLUMNS)]
        for row in record["families"]
    ]
    seen = [
        f"{run['versions']}; {run['device']}, {run['date']}" for run in record["engines"].values()
    ]
    return f"{table(['family', *GPU_COLUMNS.values()], rows)}\n\n{'. '.join(seen)}."


def refusals() -> str:
    """Why a family is refused, in the engine's words, without numbers that change."""
    there = {row["family"]: row for row in load(ON_GPU)["families"]}
    rows = [
        [row["family"], title, re.sub(r"relative difference [\d.e-]+; ", "", message)]
        for row in load("targets")["families"]
        for found, titles in ((row, TARGET_COLUMNS), (there.get(row["family"], {}), GPU_COLUMNS))
        for column, title in titles.items()
        if (message := found.get(column, {}).get("message"))
    ]
    return table(["family", "engine", "refusal"], rows)
