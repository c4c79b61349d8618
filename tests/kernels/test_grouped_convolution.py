"""The convolutions' kernel, alone and within the residual's addition, against the core's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.add_rms_norm import Convolution, add_rms_norm, add_rms_norm_naive
from dflash_plugin.kernels.fp8_rows import RoundedRows
from dflash_plugin.kernels.grouped_convolution import (
    grouped_convolution,
    grouped_convolution_naive,
)
from tests.helpers.kernel_helpers import BOUND, DTYPES, error, random, values

pytestmark = pytest.mark.usefixtures("kernel_device")


def convolution_of(
    rows: int, taps: int, groups: int, width: int, block_size: int, dtype: torch.dtype
) -> Convolution:
    """The second side of a projection's result."""
    dynamic = random(rows, 2, taps, groups, dtype=dtype)[:, 1]
    return Convolution(dynamic, random(taps, width, dtype=dtype), block_size)


shapes = given(
    rows=st.sampled_from([0, 1, 5, 17]),
    taps=st.sampled_from([1, 2, 3, 8]),
    sizes=st.sampled_from([(1, 123), (123, 123), (9, 576), (64, 1024), (4, 1028)]),
    block_size=st.sampled_from([1, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    rounds=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@shapes
def test_grouped_convolution(rows, taps, sizes, block_size, dtype, rounds):
    groups, width = sizes
    x = random(rows, width, dtype=dtype, padding=5)
    kernels = convolution_of(rows, taps, groups, width, block_size, dtype)
    out = grouped_convolution(x, *kernels, rounds)
    twin = grouped_convolution_naive(x, *kernels, rounds)
    assert isinstance(out, RoundedRows) == rounds
    # A value that falls to its neighbor in FP8 moves by a sixteenth.
    assert error(values(out), values(twin)) < (0.01 if rounds else BOUND[dtype])


@settings(max_examples=40, deadline=None)
@shapes
def test_added_rows_are_convolved(rows, taps, sizes, block_size, dtype, rounds):
    groups, width = sizes
    x, residual = (random(rows, width, dtype=dtype, padding=pad) for pad in (5, 11))
    kernels = convolution_of(rows, taps, groups, width, block_size, dtype)
    arguments = (x, residual, 1 + 0.2 * random(width).to(dtype), 1e-6, False, rounds, kernels)
    (normed, total), (twin, expected) = add_rms_norm(*arguments), add_rms_norm_naive(*arguments)
    assert error(total, expected) < BOUND[dtype]
    assert error(values(normed), values(twin)) < (0.01 if rounds else 2 * BOUND[dtype])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(24, 4).T}, "x must be contiguous"),
        ({"dynamic": torch.zeros(4, 2, 5)}, "groups that divide 24"),
        ({"dynamic": torch.zeros(3, 2, 6)}, r"not \[4, taps, groups\]"),
        ({"dynamic": torch.zeros(4, 6, 2).mT}, "taps and groups of a row"),
        ({"base": torch.zeros(1, 24)}, r"base must be contiguous \[2, 24\]"),
        ({"block_size": 0}, "block_size is 0"),
        (
            {
                "x": torch.zeros(4, 65_552),
                "base": torch.zeros(2, 65_552),
                "dynamic": torch.zeros(4, 2, 1),
            },
            "at most 65,536",
        ),
    ],
)
def test_faulty_arguments(change, message):
    arguments = {
        "x": torch.zeros(4, 24),
        "dynamic": torch.zeros(4, 2, 6),
        "base": torch.zeros(2, 24),
        "block_size": 4,
        "rounds": True,
    }
    with pytest.raises(ValueError, match=message):
        grouped_convolution(*{**arguments, **change}.values())


def test_a_convolution_needs_something_to_be_added_to():
    kernels = convolution_of(4, 2, 6, 24, 4, torch.float32)
    with pytest.raises(ValueError, match="takes a residual"):
        add_rms_norm(random(4, 24), None, random(24), 1e-6, convolved_with=kernels)
