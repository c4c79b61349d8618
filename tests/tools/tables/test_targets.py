"""The table of targets with what was seen on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import targets as program
from tools.tables import targets

REFUSED = {"text": "refused", "message": "not this one"}


@pytest.fixture
def on_cpu(results: Path) -> Path:
    """Two families on a CPU."""
    row = {
        "model_type": "m",
        "trait": "t",
        **{column: {"text": "x"} for column in targets.TARGET_COLUMNS},
    }
    record = {
        "versions": dict.fromkeys(targets.TARGET_COLUMNS, "1.0"),
        "families": [{"family": name, **row} for name in ("Llama", "Gemma 2")],
    }
    (results / "targets.json").write_text(json.dumps(record))
    return results


def record(file: Path, engine: str, family: str, found: dict[str, Any]) -> None:
    about = {"device": "NVIDIA H200", "date": "2026-11-30", "command": "c"}
    run = {"about": about, "engine": engine, "versions": f"{engine} 2.0"}
    program.update(file, run, family, found)


def test_a_gpu_has_a_table_of_its_own(on_cpu):
    file = on_cpu / f"{targets.ON_GPU}.json"
    equal = {"text": "equal", "attention": "TRITON_ATTN", "stands_in": "experts in torch"}
    record(file, "sglang", "Llama", {"text": "equal", "attention": "TritonAttnBackend"})
    record(file, "vllm", "Llama", REFUSED)
    # What runs again takes the place of what was there.
    record(file, "vllm", "Llama", equal)
    record(file, "sglang", "Gemma 2", REFUSED)
    assert targets.targets_on_gpu().splitlines() == [
        "| family | vLLM on a GPU | SGLang on a GPU |",
        "| --- | --- | --- |",
        "| Llama | equal; `TRITON_ATTN`; experts in torch | equal; `TritonAttnBackend` |",
        "| Gemma 2 | still to be run | refused |",
        "",
        "sglang 2.0; NVIDIA H200, 2026-11-30. vllm 2.0; NVIDIA H200, 2026-11-30.",
    ]
    assert "GPU" not in targets.targets()
    assert targets.targets().endswith("\n\n1.0.")
    assert targets.refusals().splitlines()[2:] == ["| Gemma 2 | SGLang on a GPU | not this one |"]


def test_the_record_keeps_the_tables_order(on_cpu):
    file = on_cpu / "record.json"
    for family in ("Gemma 2", "Llama"):
        record(file, "vllm", family, {"text": "equal"})
    assert [row["family"] for row in json.loads(file.read_text())["families"]] == [
        "Llama",
        "Gemma 2",
    ]
