"""The benchmark of a training step, small, so that its command keeps running."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


def test_the_command_writes_times_of_every_part(tmp_path, monkeypatch):
    output = tmp_path / "step.json"
    options = (
        "--batch 2 --anchors 8 --prompt 4 --response 40 --layers 1 --repeats 1 --block-size 4 "
        "--draft-layers 1 --intermediate-size 32"
    )
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options.split(), "--output", str(output)])
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    }
    script = runpy.run_path(str(SCRIPT))
    script["SIZES"]["smollm2"].update(sizes)
    script["main"]()
    found = json.loads(output.read_text())
    assert {"command", "device", "torch", "triton", "date"} <= found.keys()
    dense, flex = found["rows"]
    assert [dense["attention"], flex["attention"]] == ["dense", "flex"]
    assert flex["loss"] == pytest.approx(dense["loss"], rel=1e-4)
    parts = {"features", "drafter alone, forward", "forward", "backward", "optimizer"}
    for row in found["rows"]:
        assert row["anchors"] == 16
        assert row["step"] > 0
        assert set(row["milliseconds"]) == parts
