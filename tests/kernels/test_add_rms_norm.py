"""Residual addition and RMS norm against the twin, and the twin against the core's norm."""

from __future__ import annotations

import pytest
import torch

from dflash_plugin.drafter.layers import RMSNorm
from dflash_plugin.kernels.add_rms_norm import Convolution, add_rms_norm, add_rms_norm_naive
from dflash_plugin.kernels.quantize_rows import quantize_rows
from tests.helpers.kernel_helpers import BOUND, DTYPES, EPS, NoLaunch, error, random, values

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [123, 576, 1024])
@pytest.mark.parametrize("rows", [0, 1, 5, 17])
@pytest.mark.parametrize(("residual", "gemma"), [(True, False), (False, True), (True, True)])
def test_add_rms_norm(
    rows: int, width: int, dtype: torch.dtype, residual: bool, gemma: bool
) -> None:
    x = random(rows, width, dtype=dtype, padding=5)
    other = random(rows, width, dtype=dtype, padding=11) if residual else None
    weight = 1 + 0.2 * random(width).to(dtype)
    normed, total = add_rms_norm(x, other, weight, EPS, gemma)
    twin_normed, twin_total = add_rms_norm_naive(x, other, weight, EPS, gemma)
    assert torch.equal(total, twin_total)
    assert error(normed, twin_normed) < BOUND[dtype]
    assert (total is x) == (other is None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("residual", [False, True])
def test_rows_are_rounded_as_by_quantize_rows(
    residual: bool, rows: int, dtype: torch.dtype
) -> None:
    """The twin rounds its own norm, of which some values fall to the neighbor."""
    x = 4 * random(rows, 246, dtype=dtype, padding=5)
    other = random(rows, 246, dtype=dtype, padding=11) if residual else None
    arguments = (x, other, 1 + 0.2 * random(246).to(dtype), EPS)
    rounded, total = add_rms_norm(*arguments, rounds=True)
    twin, _ = add_rms_norm_naive(*arguments, rounds=True)
    plain, expected = add_rms_norm(*arguments)
    assert torch.equal(total, expected)
    separately = quantize_rows(plain)
    assert torch.equal(rounded.values.float(), separately.values.float())
    assert torch.equal(rounded.scales, separately.scales)
    assert rounded.dtype == twin.dtype == dtype
    assert error(values(rounded), values(twin)) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemma", [False, True])
def test_the_twin_is_the_cores(dtype: torch.dtype, gemma: bool) -> None:
    norm = RMSNorm(123, EPS, gemma).to(dtype)
    with torch.no_grad():
        norm.weight.add_(0.2 * random(123).to(dtype))
    x, residual = random(5, 123, dtype=dtype), random(5, 123, dtype=dtype, padding=3)
    normed, total = add_rms_norm_naive(x, residual, norm.weight, EPS, gemma)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm(x + residual))


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_plugin.kernels.add_rms_norm._kernel", NoLaunch())
    empty = torch.zeros(0, 24)
    normed, total = add_rms_norm(empty, empty, torch.ones(24), EPS)
    assert normed.shape == total.shape == (0, 24)


def test_faulty_arguments() -> None:
    x, weight = torch.zeros(2, 24), torch.ones(24)
    kernels = Convolution(torch.zeros(2, 2, 6), torch.zeros(2, 24), 4)
    for arguments, options, message in (
        ((x, None, torch.ones(23)), {}, "weight"),
        ((x, x.half(), weight), {}, "residual"),
        ((torch.zeros(24, 2).T, None, weight), {}, "contiguous"),
        ((x, None, weight), {"convolved_with": kernels}, "takes a residual"),
    ):
        with pytest.raises(ValueError, match=message):
            add_rms_norm(*arguments, EPS, **options)
