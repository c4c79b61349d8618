"""Linears with FP8 weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.fp8 import Fp8Weight, quantise
from dflash_plugin.kernels.common import ProductTile
from dflash_plugin.kernels.fp8_linear import fp8_linear, fp8_linear_naive
from kernel_helpers import BOUND, DTYPES, error, random

pytestmark = pytest.mark.usefixtures("kernel_device")
SMALL = ProductTile(16, 16, 32, 4, 2)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 17, 70]),
    columns=st.sampled_from([1, 16, 33]),
    width=st.sampled_from([32, 40, 96]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    tile=st.sampled_from([SMALL, None]),
)
def test_fp8_linear(rows, columns, width, dtype, bias, tile):
    x = random(rows, width, dtype=dtype, padding=8)
    weight = quantise(random(columns, width, dtype=dtype))
    added = random(columns, dtype=dtype) if bias else None
    out = fp8_linear(x, weight, added, tile=tile)
    assert error(out, fp8_linear_naive(x, weight, added)) < BOUND[dtype]


def test_leading_dimensions_are_kept():
    weight = quantise(random(8, 32))
    out = fp8_linear(random(2, 3, 32), weight)
    assert out.shape == (2, 3, 8)
    assert torch.equal(out.view(6, 8), fp8_linear(random(2, 3, 32).view(6, 32), weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantise_keeps_each_row_to_an_eighth_of_its_last_bit(dtype):
    """Rows far apart in size lose alike: three bits of fraction, so at most 1/16 of a value."""
    weight = random(9000, 40) * 10.0 ** (torch.arange(9000) % 5 - 2)[:, None]
    weight = weight.to(dtype)
    weight[3] = 0.0
    quantised = quantise(weight)
    whole = quantised.values.float() * quantised.scales[:, None]
    assert torch.equal(whole[3], torch.zeros(40))
    # Below a smallest normal value the steps are even.
    step = torch.maximum(weight.float().abs() / 16, quantised.scales[:, None] * 2**-10)
    assert ((whole - weight.float()).abs() <= step * 1.001).all()
    assert (whole.abs().amax(dim=1) >= weight.float().abs().amax(dim=1) * 0.999).all()


def test_faulty_arguments():
    x, weight = torch.zeros(2, 32), quantise(torch.ones(8, 32))
    for arguments, message in (
        ((torch.zeros(2, 31), weight), r"values must be float8_e4m3fn \[N, 31\]"),
        ((x, Fp8Weight(weight.values.float(), weight.scales)), "values must be"),
        ((x, Fp8Weight(weight.values, weight.scales[:7])), r"scales must be float32 \[8\]"),
        ((x, weight, torch.zeros(7)), r"bias must be \[8\]"),
        ((torch.zeros(32, 2).T, weight), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_linear(*arguments)
