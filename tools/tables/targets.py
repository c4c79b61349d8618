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


def targets() -> str:
    """What each engine does with each family of targets."""
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


def refusals() -> str:
    """Why a family is refused, in the engine's words, without numbers that change."""
    rows = [
        [row["family"], title, re.sub(r"relative difference [\d.e-]+; ", "", message)]
        for row in load("targets")["families"]
        for column, title in TARGET_COLUMNS.items()
        if (message := row[column].get("message"))
    ]
    return table(["family", "engine", "refusal"], rows)
