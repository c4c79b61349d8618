"""The best token of each row of logits with its normaliser."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.row_choice import row_choice, row_choice_naive
from kernel_helpers import DTYPES, random

pytestmark = pytest.mark.usefixtures("kernel_device")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5]),
    count=st.sampled_from([1, 2, 100, 4096, 9001]),
    dtype=st.sampled_from(DTYPES),
    apart=st.booleans(),
    masked=st.booleans(),
)
def test_row_choice(rows, count, dtype, apart, masked):
    logits = random(rows, count + 3 * apart, dtype=dtype)[:, :count] * 5
    if masked and count > 1:
        logits[:, ::2] = float("-inf")
    found, expected = row_choice(logits), row_choice_naive(logits)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.log_sum_exp, expected.log_sum_exp, rtol=1e-5, atol=1e-5)


def test_of_equal_ones_the_first():
    logits = torch.zeros(2, 5000)
    logits[1, [4500, 17]] = 1.0
    assert row_choice(logits).tokens.flatten().tolist() == [0, 17]


def test_faulty_arguments():
    for logits, message in (
        (torch.zeros(3), "give \\[T, V\\]"),
        (torch.zeros(3, 0), "give \\[T, V\\]"),
        (torch.zeros(3, 4).T, "contiguous rows"),
        (torch.zeros(3, 4, dtype=torch.float64), "float64: give one of"),
    ):
        with pytest.raises(ValueError, match=message):
            row_choice(logits)
