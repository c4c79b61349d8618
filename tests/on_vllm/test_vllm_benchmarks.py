"""The recorded benchmark commands run, small, on today's code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.on_vllm.vllm_helpers import ON_V2

ROOT = Path(__file__).parents[2]


def run(script: str, output: Path, *options: str) -> dict:
    command = [sys.executable, ROOT / "benchmarks" / script, "--output", output, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    logs = {path.name: path.read_text()[-2000:] for path in output.parent.glob("*.log")}
    assert done.returncode == 0, (done.stderr[-2000:], logs)
    return json.loads(output.read_text())


# vLLM's own DFlash does not draft with dummy weights on a CPU.
def test_serving_with_replayed_acceptance(tmp_path):
    record = run(
        "vllm_serving.py",
        tmp_path / "result.json",
        *("--shape", "tiny", "--replay", "4,2.5", "--modes", "plugin;none", "--together"),
        *("--concurrency", "2", "--new-tokens", "24", "--repeats", "1", "--per-slot", "1"),
        *("--dtype", "float32", "--settings", '{"enforce_eager": true}'),
    )
    assert record["failed"] == {}
    rows = {row["engine"]: row for row in record["rows"]}
    assert list(rows) == ["plugin", "none"]
    assert rows["none"]["tau"] == 1
    for row in rows.values():
        assert 0 < row["request_seconds"]["median"] <= row["request_seconds"]["95 %"]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert all(record["attention"][mode] for mode in rows)
    if ON_V2:  # The V1 runner has no seam for replayed acceptance.
        # Random weights accept nothing by themselves.
        assert rows["plugin"]["tau"] > 2
    second = json.loads((tmp_path / "result-2.5.json").read_text())
    # Without a drafter, acceptance makes no difference: that engine is measured once.
    assert [row["engine"] for row in second["rows"]] == ["plugin"]


def test_random_load_with_new_weights_on_the_way(tmp_path):
    record = run(
        "vllm_soak.py",
        tmp_path / "soak.json",
        *("--steps", "45", "--pool", "3", "--longest", "8", "--running", "3", "--swaps", "2"),
        *("--settings", '{"enforce_eager": true}'),
    )
    assert record["mismatches"] == []
    assert record["finished"] > 5
    assert record["tau"] > 1.5


def test_acceptance_by_temperature_and_limits(tmp_path):
    record = run(
        "sampled_tau.py",
        tmp_path / "result.json",
        *("--engine", "vllm", "--prompts", "2", "--new-tokens", "8", "--temperatures", "0.6"),
        *("--drafters", "examples/smollm2-135m-dflash2", "--ways", "probabilistic"),
    )
    assert [row["limits"] for row in record["rows"]] == ["none", "top-p 0.95, top-k 20"]
    assert all(row["tau"] > 1 for row in record["rows"])
