"""Some of the families of docs/targets.md, which has them all: what is recorded still holds.

And the command that runs families on a GPU runs one here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.families import FAMILIES, Family
from tests.helpers.family_command import run_one
from tests.on_vllm.target_families import COLUMN, outcome
from tests.on_vllm.vllm_helpers import ON_V2

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "targets.json"
# Recurrent states and experts, sinks, positions on several axes, one window for all; and a refusal.
ON_V1 = ["Qwen3.5-MoE", "gpt-oss", "Qwen3-VL", "Mistral", "Gemma 3"]
# Attention, and gated delta rules; in passes of fewer rows too.
TESTED = ["Llama", "Qwen3.5 text"] if ON_V2 else ON_V1


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict]:
    """The recorded table, by family."""
    return {row["family"]: row for row in json.loads(RECORD.read_text())["families"]}


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.name in TESTED], ids=lambda one: one.name
)
def test_vllm_does_with_a_family_what_is_recorded(family: Family, recorded):
    assert outcome(family) == recorded[family.name][COLUMN]


@pytest.mark.skipif(ON_V2, reason="one runner is enough")
def test_the_command_for_a_gpu_runs_a_family_here(tmp_path):
    found = run_one("vllm", "Llama", tmp_path)
    assert found == {"text": "equal", "attention": "CPU_ATTN"}
