"""The timeline of a decode step, out of made-up traces."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from timeline import covered, load, timeline


def kernel(name: str, start: float, length: float, correlation: int) -> dict:
    args = {"correlation": correlation}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": length, "args": args}


def launch(correlation: int) -> dict:
    args = {"correlation": correlation}
    name = "cudaGraphLaunch"
    return {"ph": "X", "cat": "cuda_runtime", "name": name, "ts": 0, "dur": 5, "args": args}


def trace(steps: int) -> list[dict]:
    """Steps of 10 ms: 1 idle, 2 draft, 0.5 eager of which half beside the draft, 6.75 verify."""
    events = []
    for step in range(steps):
        start, first = 10_000.0 * step, 10 * step
        events += [launch(first), launch(first + 1)]
        events += [
            kernel("void gemm<bf16>(int)", start + 1000, 1500, first),
            kernel("attention", start + 2500, 500, first),
            kernel("accept", start + 2750, 500, first + 2),
            kernel("void gemm<bf16>(int)", start + 3250, 6750, first + 1),
        ]
    return events


def test_a_steps_parts_add_up():
    found = timeline(trace(5))
    assert found["steps"] == 4
    assert found["milliseconds"] == {
        "verify graph": 6.75,
        "other graphs": 2.0,
        "eager": 0.5,
        "idle": 1.0,
        "step": 10.0,
    }
    assert found["eager_launches"] == 1
    assert found["longest"]["other graphs"] == {"gemm": 1.5, "attention": 0.5}
    assert found["longest"]["eager"] == {"accept": 0.5}


def test_steps_that_read_prompts_stand_by_themselves():
    """Every other step has 100 small launches and 20 parts of graphs before its own work."""
    events = []
    for step in range(8):
        start, first = 20_000.0 * step, 1000 * step
        if step % 2:
            events += [kernel("prompt", start + 60 * n, 50, first + 100 + n) for n in range(100)]
            for n in range(20):
                events += [launch(first + 300 + n)]
                events += [kernel("layer", start + 6000 + 50 * n, 50, first + 300 + n)]
        events += [launch(first), launch(first + 1)]
        events += [
            kernel("draft", start + 8000, 2000, first),
            kernel("verify", start + 10_000, 10_000, first + 1),
        ]
    found = timeline(events)
    assert (found["steps"], found["with_prompts"]["steps"]) == (3, 4)
    assert found["milliseconds"]["idle"] == 8.0
    prompts = found["with_prompts"]["milliseconds"]
    assert (prompts["eager"], prompts["other graphs"]) == (5.0, 3.0)
    assert prompts["idle"] == pytest.approx(2.0)


def test_a_trace_without_a_whole_step():
    with pytest.raises(ValueError, match="1 verify passes in the trace"):
        timeline(trace(1))


def test_overlapping_spans_count_once():
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4


def test_traces_are_read_packed_or_not(tmp_path):
    content = json.dumps({"traceEvents": [*trace(2), {"ph": "M", "name": "process_name"}]})
    plain, packed = tmp_path / "t.json", tmp_path / "t.json.gz"
    plain.write_text(content)
    packed.write_bytes(gzip.compress(content.encode()))
    assert load(plain) == load(packed) == trace(2)
