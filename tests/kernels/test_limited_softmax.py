"""Limited distributions without a sort, against the sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_plugin.kernels import limited_softmax as module
from dflash_plugin.kernels.limited_softmax import (
    TokenLimits,
    limited_softmax,
    limited_softmax_naive,
)
from tests.helpers.kernel_helpers import DTYPES, random

pytestmark = pytest.mark.usefixtures("kernel_device")

# Top-k, top-p and min-p of a request.
KINDS = [
    (0, 0.9, 0.0),
    (5, 1.0, 0.0),
    (20, 0.95, 0.0),
    (0, 1.0, 0.1),
    (0, 1.0, 0.0),
    (3, 0.5, 0.2),
    (40, 0.8, 0.0),
    (1, 1.0, 0.0),
    (0, 0.01, 0.0),
    (10_000, 0.7, 0.05),
]


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    monkeypatch.setattr(module, "LANES", request.param)
    return int(request.param)


def limits_of(kinds: list[tuple[int, float, float]]) -> TokenLimits:
    top_k, top_p, min_p = (list(part) for part in zip(*kinds, strict=True))
    return TokenLimits(
        torch.tensor(top_k, dtype=torch.int64), torch.tensor(top_p), torch.tensor(min_p)
    )


def check(logits: Tensor, temperature: Tensor, limits: TokenLimits | None) -> Tensor:
    found = limited_softmax(logits, temperature, limits)
    expected = limited_softmax_naive(logits, temperature, limits)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    return found


# A row in one piece; rows in pieces, of which fewer or more tokens are kept than there are lanes.
@pytest.mark.parametrize("lanes", [512, 64, 16], indirect=True)
@pytest.mark.parametrize("scale", [0.2, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_keep_what_a_sort_keeps(lanes, scale, dtype):
    logits = (scale * random(len(KINDS), 2, 300, seed=3)).to(dtype)
    temperature = 0.3 + random(len(KINDS), 2, seed=4).abs()
    probs = check(logits, temperature, limits_of(KINDS))
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(len(KINDS), 2))


@pytest.mark.parametrize("lanes", [512, 16], indirect=True)
def test_requests_without_limits(lanes):
    check(3 * random(2, 3, 100), 0.5 + random(2, 3).abs(), None)


@pytest.mark.parametrize("lanes", [512, 16], indirect=True)
@pytest.mark.parametrize("limits", [None, limits_of([(0, 0.9, 0.0), (4, 1.0, 0.0)])])
def test_a_greedy_row_takes_the_first_of_the_largest(lanes, limits):
    logits = random(2, 1, 100, seed=7)
    logits[:, :, [31, 70, 90]] = 9.0
    probs = check(logits, torch.zeros(2, 1), limits)
    assert probs.argmax(dim=-1).flatten().tolist() == [31, 31]
    assert torch.equal(probs.amax(dim=-1), torch.ones(2, 1))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    top_k=st.integers(0, 45),
    min_p=st.sampled_from([0.0, 0.3]),
)
def test_ties_with_the_last_kept_token_stay(values, top_k, min_p):
    """Few values, so that many tokens are tied."""
    logits = torch.tensor(values, dtype=torch.float32).view(1, 1, -1)
    check(logits, torch.ones(1, 1), limits_of([(top_k, 1.0, min_p)]))


def test_tokens_as_probable_as_one_that_top_p_keeps_stay():
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).log().view(1, 1, -1)
    probs = check(logits, torch.ones(1, 1), limits_of([(0, 0.5, 0.0)]))
    torch.testing.assert_close(probs.flatten(), torch.tensor([0.4, 0.2, 0.2, 0.2]))
    probs = check(logits, torch.ones(1, 1), limits_of([(0, 0.3, 0.0)]))
    assert probs.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("lanes", [512, 16], indirect=True)
def test_tokens_that_are_ruled_out_stay_out(lanes):
    """As a grammar leaves few tokens, fewer than a top-k."""
    logits = torch.full((3, 1, 100), float("-inf"))
    logits[:, :, [3, 50, 77]] = torch.tensor([1.0, 2.0, 0.0])
    logits[:, :, 60] = -0.0
    kinds = [(10, 1.0, 0.0), (0, 0.99, 0.0), (0, 1.0, 0.0)]
    probs = check(logits, torch.ones(3, 1), limits_of(kinds))
    assert (probs > 0).sum(dim=-1).flatten().tolist() == [4, 4, 4]


def test_rows_that_lie_apart():
    """As those of logits that are padded to a multiple."""
    padded = random(2, 3, 112)
    limits = limits_of([(0, 0.9, 0.0), (7, 1.0, 0.0)])
    check(padded[..., :100], torch.ones(2, 3), limits)


def test_no_rows():
    assert limited_softmax(torch.zeros(0, 3, 10), torch.ones(0, 3)).shape == (0, 3, 10)


def test_faulty_arguments():
    logits, ones = torch.zeros(2, 3, 10), torch.ones(2, 3)
    limits = limits_of([(1, 1.0, 0.0)] * 2)
    for arguments, message in (
        ((logits[0], ones, limits), r"logits must be \[B, T, V\]"),
        ((logits.long(), ones, limits), "in a floating dtype"),
        ((logits, ones[:, :2], limits), r"temperature must be float32 \[2, 3\]"),
        ((logits, ones, limits._replace(top_k=ones[:, 0])), "top_k must be torch.int64"),
        ((logits, ones, limits._replace(min_p=ones[:1, 0])), r"min_p must be .*\[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            limited_softmax(*arguments)
