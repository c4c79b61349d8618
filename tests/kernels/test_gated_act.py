"""The gated activation against its twin, and the twin against torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dflash_plugin.kernels.gated_act import gated_act, gated_act_naive
from dflash_plugin.kernels.quantize_rows import quantize_rows
from tests.helpers.kernel_helpers import BOUND, DTYPES, NoLaunch, error, random, values

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 123, 1024, 1500])
@pytest.mark.parametrize("rows", [0, 1, 5, 17])
def test_gated_act(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = 4 * random(rows, 2 * width, dtype=dtype, padding=3)
    twin = gated_act_naive(gate_up)
    assert error(gated_act(gate_up), twin) < BOUND[dtype]
    gate, up = gate_up[:, :width], gate_up[:, width:]
    assert torch.equal(twin, F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_rows_are_rounded_as_by_quantize_rows(rows: int, dtype: torch.dtype) -> None:
    """The twin rounds its own product, of which some values fall to the neighbor."""
    gate_up = 4 * random(rows, 246, dtype=dtype, padding=5)
    rounded, twin = gated_act(gate_up, rounds=True), gated_act_naive(gate_up, rounds=True)
    separately = quantize_rows(gated_act(gate_up))
    assert torch.equal(rounded.values.float(), separately.values.float())
    assert torch.equal(rounded.scales, separately.scales)
    assert rounded.dtype == twin.dtype == dtype
    assert error(values(rounded), values(twin)) < 0.02


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_plugin.kernels.gated_act._kernel", NoLaunch())
    assert gated_act(torch.zeros(0, 24)).shape == (0, 12)


def test_faulty_arguments() -> None:
    for gate_up in (torch.zeros(2, 23), torch.zeros(24, 2).T):
        with pytest.raises(ValueError, match="gate_up"):
            gated_act(gate_up)
