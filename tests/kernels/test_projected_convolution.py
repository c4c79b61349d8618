"""A sublayer's convolution with the product before it, against the core's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.fp8_rows import RoundedRows
from dflash_plugin.kernels.projected_convolution import (
    projected_convolution,
    projected_convolution_naive,
)
from tests.helpers.kernel_helpers import BOUND, DTYPES, error, random, values

pytestmark = pytest.mark.usefixtures("kernel_device")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 16, 37]),
    taps=st.sampled_from([1, 2, 3]),
    sizes=st.sampled_from([(1, 24), (41, 123), (9, 576), (64, 1024), (4, 1028), (20, 4160)]),
    block_size=st.sampled_from([1, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    rounds=st.booleans(),
)
def test_projected_convolution(rows, taps, sizes, block_size, dtype, rounds):
    groups, width = sizes
    x = random(rows, width, dtype=dtype, padding=8)
    weight = (random(2 * taps * groups, width, dtype=torch.float32) / width**0.5).to(dtype)
    arguments = (x, weight, random(taps, width, dtype=dtype), block_size, rounds)
    (out, after), (twin, expected) = (
        run(*arguments) for run in (projected_convolution, projected_convolution_naive)
    )
    assert isinstance(out, RoundedRows) == rounds
    # Kernels are sums of many products, of which the order of adding up moves some by a step of
    # their dtype; a value that falls to its neighbor in FP8 moves by a sixteenth.
    assert error(after, expected) < 4 * BOUND[dtype]
    assert error(values(out), values(twin)) < (0.02 if rounds else 4 * BOUND[dtype])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(24, 4).T}, "x must be contiguous"),
        ({"weight": torch.zeros(20, 24)}, r"\[2 \* 2 \* groups, 24\] with groups that divide 24"),
        ({"weight": torch.zeros(3, 24)}, r"weight is \[3, 24\]"),
        ({"weight": torch.zeros(24, 23)}, r"weight is \[24, 23\]"),
        ({"weight": torch.zeros(24, 24).half()}, "weight must be contiguous torch.float32"),
        ({"weight": torch.zeros(24, 24).T}, "weight must be contiguous"),
        ({"base": torch.zeros(2, 20)}, r"base must be contiguous \[taps, 24\]"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_faulty_arguments(change, message):
    arguments = {
        "x": torch.zeros(4, 24),
        "weight": torch.zeros(24, 24),
        "base": torch.zeros(2, 24),
        "block_size": 4,
    }
    x, *others = {**arguments, **change}.values()
    with pytest.raises(ValueError, match=message):
        projected_convolution(x, *others)
