"""A few families of targets on SGLang: what the table of targets says of them holds.

``tools/targets.py --engine sglang`` runs all. And the command that runs families on a GPU runs one
here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.families import FAMILIES
from tests.helpers.family_command import run_one
from tests.on_sglang.target_families import COLUMN, outcome

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "targets.json"
# A method of EAGLE 3's; inputs by layer and shared keys; latent attention and experts; positions on
# several axes; gated delta rules, with a model that SGLang tells the wrong layers. Then one that is
# refused, and two that SGLang does not run here without a drafter.
SHOWN = (
    "Qwen2, Qwen2.5",
    "Gemma 4",
    "DeepSeek V3, Kimi K2",
    "Qwen3-VL",
    "Qwen3-Next",
    "Qwen3.5 text",
    "Gemma 3",
    "Qwen3.5-MoE",
    "Zamba 2",
)
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, Any]]:
    """The recorded table, by family."""
    return {row["family"]: row for row in json.loads(RECORD.read_text())["families"]}


@pytest.mark.parametrize("name", SHOWN)
def test_a_family_is_as_the_table_says(schedulers, recorded, tmp_path, name):
    assert outcome(schedulers, BY_NAME[name], tmp_path) == recorded[name][COLUMN]


def test_the_record_has_every_family_and_no_other(recorded):
    assert list(recorded) == list(BY_NAME)
    assert all(row[COLUMN]["text"] for row in recorded.values())


def test_the_command_for_a_gpu_runs_a_family_here(tmp_path):
    found = run_one("sglang", "Llama", tmp_path)
    assert found == {"text": "equal", "attention": "TorchNativeAttnBackend"}
