"""Rows rounded to FP8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.fp8_rows import quantize
from dflash_plugin.kernels.quantize_rows import quantize_rows, quantize_rows_naive
from tests.helpers.kernel_helpers import DTYPES, error, random

pytestmark = pytest.mark.usefixtures("kernel_device")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 70]),
    width=st.sampled_from([1, 16, 40, 4100]),
    dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 3]),
)
def test_quantize_rows(rows, width, dtype, padding):
    x = random(rows, width, dtype=dtype, padding=padding)
    x = x * 10.0 ** (torch.arange(rows) % 5 - 2)[:, None].to(dtype)
    if rows > 1:
        x[1] = 0.0
    out, reference = quantize_rows(x), quantize_rows_naive(x)
    assert error(out.scales, reference.scales) < 1e-6
    # A GPU's quotient may fall on the other side of what is rounded up.
    assert error(out.values.float(), reference.values.float()) < 1e-3
    assert out.values.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_value_keeps_to_an_eighth_of_its_last_bit(dtype):
    """Rows far apart in size lose alike: three bits of fraction, so at most 1/16 of a value."""
    weight = random(9000, 40) * 10.0 ** (torch.arange(9000) % 5 - 2)[:, None]
    weight = weight.to(dtype)
    weight[3] = 0.0
    quantized = quantize(weight)
    whole = quantized.values.float() * quantized.scales[:, None]
    assert torch.equal(whole[3], torch.zeros(40))
    # Below a smallest normal value the steps are even.
    step = torch.maximum(weight.float().abs() / 16, quantized.scales[:, None] * 2**-10)
    assert ((whole - weight.float()).abs() <= step * 1.001).all()
    assert (whole.abs().amax(dim=1) >= weight.float().abs().amax(dim=1) * 0.999).all()


def test_faulty_arguments():
    for x in (torch.zeros(3), torch.zeros(32, 2).T, torch.zeros(1, 65_537)):
        with pytest.raises(ValueError, match="give contiguous rows"):
            quantize_rows(x)
