"""Tokens drawn in one launch, against the twin and against their shares."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from dflash_plugin.kernels.draw_tokens import draw_tokens, draw_tokens_naive
from tests.helpers.kernel_helpers import random

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("vocabulary", [1, 7, 100, 5000])
def test_tokens_are_the_twins(vocabulary):
    """Half of the tokens cannot be drawn; a row sums to what it happens to."""
    probs = random(5, 4, vocabulary, seed=1).clamp(min=0)
    probs[..., -1] += 0.1
    u = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u[0, 0], u[0, 1] = 0.0, 1 - 2**-53
    tokens = draw_tokens(probs, u)
    assert torch.equal(tokens, draw_tokens_naive(probs, u))
    assert (probs.gather(-1, tokens[..., None]) > 0).all()


def test_tokens_come_as_often_as_they_are_probable():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(4000, 4).contiguous()
    u = (torch.arange(4000) + 0.5) / 4000
    tokens = draw_tokens(probs, u)
    counts = torch.bincount(tokens, minlength=4)
    assert counts[1] == 0
    assert chisquare(counts[[0, 2, 3]], [2000, 1200, 800]).pvalue > 0.01


def test_no_rows():
    assert draw_tokens(torch.zeros(0, 3, 5), torch.zeros(0, 3)).shape == (0, 3)


def test_faulty_arguments():
    probs, u = torch.ones(2, 3, 5), torch.zeros(2, 3)
    for arguments, message in (
        ((probs.double(), u), "probs must be contiguous float32"),
        ((probs[..., :4], u), "probs must be contiguous float32"),
        ((probs, u[:, :2]), r"u must be contiguous \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_tokens(*arguments)
