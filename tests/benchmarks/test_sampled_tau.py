"""The table of sampled requests' τ runs, small, on today's code, and goes on where it ended."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import sampled_tau

DRAFTER = "examples/smollm2-135m-dflash2"


@torch.no_grad()
def measure(output: Path, **changes: object) -> list[dict]:
    options = {"prompts": 2, "new_tokens": 8, "temperatures": "0.6", "ways": "greedy"}
    engine = sampled_tau.Name.transformers
    sampled_tau.main(output, engine, **{**options, "drafters": DRAFTER, **changes})
    return json.loads(output.read_text())["rows"]


def test_a_row_for_each_temperature_and_limit(tmp_path):
    rows = measure(tmp_path / "made" / "result.json")
    assert [(row["temperature"], row["limits"]) for row in rows] == [
        (0.6, "none"),
        (0.6, "top-p 0.95, top-k 20"),
    ]
    assert all(1 < row["tau"] <= 8 and row["passes"] > 1 for row in rows)


def test_the_error_is_that_of_texts():
    """Passes of a text that are alike tell no more than one of them."""
    assert sampled_tau.tau_of([[1, 3], [2]]) == 3
    alike = [[0] * 50, [4] * 50]
    assert sampled_tau.standard_error(alike) == pytest.approx(2)
    assert sampled_tau.standard_error([[1, 3], [3, 1]]) == 0


def test_rows_are_kept_and_the_missing_ones_are_added(tmp_path, monkeypatch):
    asked = []

    @contextmanager
    def engine(*_):
        yield lambda temperature, limits: asked.append((temperature, limits)) or {"tau": 2.0}

    monkeypatch.setattr(sampled_tau, "in_transformers", engine)
    monkeypatch.setattr(sampled_tau, "real_prompts", lambda directory, data, count: [[1]] * count)
    output = tmp_path / "result.json"
    first, last = measure(output)
    record = json.loads(output.read_text())
    output.write_text(json.dumps({**record, "rows": [{**last, "tau": 7.5}]}))
    assert measure(output) == [{**last, "tau": 7.5}, first]
    limited = {"top_p": 0.95, "top_k": 20}
    assert asked == [(0.6, {}), (0.6, limited), (0.6, {})]
    assert len(measure(output, temperatures="0.6,1.0")) == 4
    assert asked[3:] == [(1.0, {}), (1.0, limited)]
    with pytest.raises(typer.BadParameter, match="max_new_tokens 8 and this run 9"):
        measure(output, new_tokens=9)
