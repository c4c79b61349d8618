"""The comparison of greedy texts runs, small, on today's code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_texts_are_the_targets_own_and_others_are_told(tmp_path):
    output, alone = tmp_path / "result.json", tmp_path / "alone.json"
    command = [
        *(sys.executable, ROOT / "benchmarks" / "greedy_texts.py", "--engine", "transformers"),
        *("--alone", alone, "--output", output, "--prompts", "3", "--tokens", "6"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(output.read_text())
    assert (record["equal"], record["of"]) == (3, 3)
    assert record["tau"] > 1.2
    texts = json.loads(alone.read_text())
    texts[1][4] += 1
    alone.write_text(json.dumps(texts))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr[-2000:]
    record = json.loads(output.read_text())
    assert record["equal"] == 2
    assert [(place["prompt"], place["at"]) for place in record["mismatches"]] == [(1, 4)]
