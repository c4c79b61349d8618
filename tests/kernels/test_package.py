"""What holds for every kernel: the choice of the twin, its imports, and what stands beside it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dflash_plugin import kernels
from dflash_plugin.kernels.gated_act import gated_act, gated_act_naive
from tests.helpers.kernel_helpers import NoLaunch

FOLDER = Path(kernels.__path__[0])
REPOSITORY = Path(__file__).parents[2]
OPS = sorted(
    path.stem for path in FOLDER.glob("*.py") if f"\ndef {path.stem}_naive(" in path.read_text()
)


def test_an_op_runs_its_twin_where_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_plugin.kernels.gated_act._kernel", NoLaunch())
    x = torch.randn(3, 8)
    with kernels.forced(False):
        assert torch.equal(gated_act(x), gated_act_naive(x))
    with kernels.forced(True), pytest.raises(AssertionError, match="launched"):
        gated_act(x)


def test_an_engine_that_compiles_the_drafter_traces_the_choice() -> None:
    compiled = torch.compile(lambda x: gated_act(x), fullgraph=True, backend="eager")
    x = torch.randn(3, 8)
    with kernels.forced(False):
        assert torch.equal(compiled(x), gated_act_naive(x))


def test_the_core_imports_and_runs_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from dflash_plugin import kernels
from dflash_plugin.kernels.gated_act import gated_act
import dflash_plugin.transformers
assert not kernels.available(torch.device("cuda"))
assert gated_act(torch.ones(2, 4)).shape == (2, 2)
with kernels.forced(True):
    try:
        gated_act(torch.ones(2, 4))
    except RuntimeError as error:
        assert "Triton is not installed" in str(error)
    else:
        raise AssertionError("launched without Triton")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_import_nothing_that_stands_above_them() -> None:
    imported = re.compile(r"from dflash_plugin\.?(\w*)")
    for path in FOLDER.glob("*.py"):
        assert set(imported.findall(path.read_text())) <= {"kernels", ""}, path.name


def test_there_are_ops() -> None:
    assert len(OPS) == 22


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_wrapper_a_test_and_a_benchmark_of_its_name(op: str) -> None:
    assert f"\n@with_twin\ndef {op}(" in (FOLDER / f"{op}.py").read_text()
    test = (REPOSITORY / "tests/kernels" / f"test_{op}.py").read_text()
    assert f"from dflash_plugin.kernels.{op} import" in test
    benchmark = (REPOSITORY / "benchmarks/kernels.py").read_text()
    assert f"\ndef {op}(" in benchmark
    assert f"\n    {op}: " in benchmark
