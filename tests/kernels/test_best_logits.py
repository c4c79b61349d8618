"""The best tokens of logits against their twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.best_logits import best_logits, best_logits_naive
from tests.helpers.kernel_helpers import DTYPES, error, random

pytestmark = pytest.mark.usefixtures("kernel_device")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 7]),
    vocabulary=st.sampled_from([16, 97, 300, 2500]),
    dtype=st.sampled_from(DTYPES),
    top_k=st.sampled_from([1, 2, 5, 16]),
    softcap=st.sampled_from([None, 3.0]),
)
def test_best_logits(rows, vocabulary, dtype, top_k, softcap):
    """Of half precision many are equal."""
    logits = random(rows, vocabulary, dtype=dtype, padding=3)
    options = {"first_token": 1000, "scale": 0.4, "softcap": softcap}
    out = best_logits(logits, top_k, **options)
    reference = best_logits_naive(logits, top_k, **options)
    assert torch.equal(out.tokens, reference.tokens)
    for name in ("logits", "log_sum_exp"):
        assert error(getattr(out, name), getattr(reference, name)) < 1e-5, name


def test_tiles_without_tokens_count_nothing():
    """As where all of a tile is masked."""
    logits = random(3, 700)
    logits[:, 100:400] = float("-inf")
    out, reference = best_logits(logits, 3), best_logits_naive(logits, 3)
    assert torch.equal(out.tokens, reference.tokens)
    assert error(out.log_sum_exp, reference.log_sum_exp) < 1e-5


def test_equal_logits_give_the_first_tokens():
    logits = torch.zeros(2, 700)
    logits[:, 1::200] = 1.0
    assert best_logits(logits, 6).tokens.tolist() == [[1, 201, 401, 601, 0, 2]] * 2


def test_what_is_no_number_gives_a_token_of_the_vocabulary():
    tokens = best_logits(torch.full((2, 300), float("nan")), 16).tokens
    assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize(
    ("logits", "top_k", "message"),
    [
        (torch.zeros(7, 2).T, 1, "contiguous"),
        (torch.zeros(2, 7), 8, "top_k is 8: give 1 to 7"),
        (torch.zeros(2, 70), 17, "top_k is 17: give 1 to 16"),
        (torch.zeros(2, 7), 0, "top_k is 0"),
    ],
)
def test_faulty_arguments(logits, top_k, message):
    with pytest.raises(ValueError, match=message):
        best_logits(logits, top_k)
