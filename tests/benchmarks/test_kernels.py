"""The kernels benchmark, small and under the interpreter, so that its command keeps running."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers.kernel_helpers import DEVICE

pytestmark = pytest.mark.usefixtures("kernel_device")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
SMALL = {
    "LAYERS": 2,
    "HIDDEN": 64,
    "HEADS": 2,
    "KV_HEADS": 1,
    "HEAD_DIM": 16,
    "INTERMEDIATE": 96,
    "VOCABULARY": 320,
    "RANK": 16,
}
# The library's product of FP8 rows takes a GPU.
LIBRARY = ("fp8_linear",)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPS = [make.__name__ for make in load().OPS]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load()
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "DEVICE", DEVICE.type)
    # An engine's own kernels have no part in these tests.
    for name in ("sglang_injection", "sglang_attention"):
        monkeypatch.setattr(module, name, lambda *_: None)
    return module


@pytest.mark.parametrize("op", [op for op in OPS if op not in LIBRARY])
def test_a_case_runs(benchmark: ModuleType, op: str) -> None:
    case = getattr(benchmark, op)(2)
    case.kernel()
    case.twin()
    assert case.moved > 0


def test_a_record_holds_every_size(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def once(run: object, *, captured: bool = True) -> float:
        run()
        return 1.0

    monkeypatch.setattr(benchmark, "microseconds", once)
    path = tmp_path / "record.json"
    monkeypatch.setattr(
        sys, "argv", ["kernels.py", "--ops", "uniforms,admit_drafts", "--output", str(path)]
    )
    benchmark.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["op"], row["rows"]) for row in rows] == [
        (op, size) for op in ("uniforms", "admit_drafts") for size in benchmark.REQUESTS
    ]
    assert {"bytes", "kernel_us", "twin_us", "copy_us", "kernel_gb_s"} <= set(rows[0])


def test_an_unknown_op_is_named(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--ops", "nothing"])
    with pytest.raises(SystemExit, match="--ops names nothing; there are add_rms_norm"):
        benchmark.main()


def test_the_benchmark_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        load().main()
