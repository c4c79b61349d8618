"""The recorded benchmark commands run, small, on today's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.on_sglang.sglang_server import ENVIRONMENT

ROOT = Path(__file__).parents[2]


def run(script: str, output: Path, *options: str) -> dict:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--output", output, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )
    logs = {path.name: path.read_text()[-2000:] for path in output.parent.glob("*.log")}
    assert done.returncode == 0, (done.stderr[-2000:], logs)
    return json.loads(output.read_text())


@pytest.mark.parametrize("modes", ["none,plugin,plugin-adaptive"])
def test_serving_with_replayed_acceptance(modes, tmp_path):
    record = run(
        "sglang_serving.py",
        tmp_path / "result.json",
        *("--shape", "tiny", "--replay", "4,2.5", "--modes", modes, "--together"),
        *("--concurrency", "2", "--new-tokens", "24", "--repeats", "1", "--per-slot", "1"),
        *("--dtype", "float32"),
    )
    assert record["failed"] == {}
    rows = {row["engine"]: row for row in record["rows"]}
    assert list(rows) == modes.split(",")
    assert rows["none"]["tau"] == 1
    for row in rows.values():
        assert 0 < row["request_seconds"]["median"] <= row["request_seconds"]["95 %"]
    # Random weights accept nothing by themselves.
    assert rows["plugin"]["tau"] > 2
    assert rows["plugin-adaptive"]["adaptive"]
    second = json.loads((tmp_path / "result-2.5.json").read_text())
    assert second["acceptance_replayed"] == 2.5
    # Without a drafter, acceptance makes no difference: that engine is measured once.
    assert [row["engine"] for row in second["rows"]] == ["plugin", "plugin-adaptive"]


def test_serving_of_requests_that_sample(tmp_path):
    """Drafts are drawn within the limits of the requests."""
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    record = run(
        "sglang_serving.py",
        tmp_path / "result.json",
        *("--shape", "tiny", "--modes", "plugin", "--sampling", json.dumps(sampling)),
        *("--concurrency", "2", "--new-tokens", "16", "--repeats", "1", "--per-slot", "1"),
        *("--dtype", "float32"),
    )
    assert record["sampling"] == sampling
    (row,) = record["rows"]
    assert row["tokens_per_second"] > 0
    assert row["tau"] >= 1


def test_random_load_with_new_weights_on_the_way(tmp_path):
    record = run(
        "sglang_soak.py",
        tmp_path / "soak.json",
        *("--steps", "45", "--minutes", "9", "--swaps", "2"),
        *("--pool", "3", "--longest", "8", "--running", "3"),
    )
    assert record["mismatches"] == []
    assert record["finished"] > 5
    assert record["tau"] > 1.5


def test_acceptance_by_how_drafts_are_made(tmp_path):
    record = run(
        "sglang_sampling.py",
        tmp_path / "sampling.json",
        *("--prompts", "2", "--new-tokens", "12", "--running", "2"),
        *("--ways", "auto", "--temperatures", "0.6,1.0"),
    )
    assert [row["temperature"] for row in record["rows"]] == [0.6, 1.0]
    assert all(row["tokens"] == 24 and row["tau"] > 1 for row in record["rows"])


def test_acceptance_by_temperature_and_limits(tmp_path):
    record = run(
        "sampled_tau.py",
        tmp_path / "result.json",
        *("--engine", "sglang", "--prompts", "2", "--new-tokens", "8", "--temperatures", "0.6"),
        *("--drafters", "examples/smollm2-135m-dflash2", "--ways", "probabilistic"),
    )
    assert [row["limits"] for row in record["rows"]] == ["none", "top-p 0.95, top-k 20"]
    assert all(row["tau"] > 1 for row in record["rows"])
