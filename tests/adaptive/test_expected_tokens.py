"""What the drafts of a batch promise."""

from __future__ import annotations

import pytest
import torch

from dflash_plugin.adaptive.expected_tokens import ExpectedTokens

CPU = torch.device("cpu")


def test_what_a_batch_promises():
    promise = ExpectedTokens(3, 32, CPU)
    prior = promise.tokens(range(4))
    assert prior[0] == 1.0
    assert prior == sorted(prior)
    chances = torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.0, 0.0]])
    promise.ask(chances.repeat(16, 1))
    # The best of two: 1, 1, 0.5, 0.25, 0.125, 0.
    assert promise.tokens(range(4)) == pytest.approx([1, 1 + 2 / 2, 1 + 2.75 / 2, 1 + 2.875 / 2])


def test_few_blocks_promise_little():
    promise = ExpectedTokens(1, 4, CPU)
    [believed] = promise.tokens([1])
    promise.ask(torch.zeros(1, 1))
    [after] = promise.tokens([1])
    assert 1 + 0.9 * (believed - 1) < after < believed
    for _ in range(200):
        promise.ask(torch.tensor([[0.0], [1.0]]))
        promise.tokens([1])
    assert promise.tokens([1]) == pytest.approx([1.5], abs=1e-3)


def test_a_shorter_block_is_expected_by_what_it_drafted_itself():
    promise, whole = ExpectedTokens(4, 32, CPU), [0, 1, 2, 3, 4]
    promise.add_short_blocks(2)
    assert promise.tokens(whole, 2)[2:] == promise.tokens(whole)[2:3] * 3
    # At first as the first drafts of a whole block.
    promise.ask(torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(32, 1))
    assert promise.tokens(whole, 2) == pytest.approx([1, 1.5, 1.75, 1.75, 1.75])
    assert promise.tokens(whole) == pytest.approx([1, 1.5, 1.75, 2.0, 2.25])
    # Once it was drafted, whole blocks say nothing of it, nor it of them.
    promise.ask(torch.full((32, 2), 0.9))
    assert promise.tokens(whole, 2) == pytest.approx([1, 1.9, 2.71, 2.71, 2.71])
    assert promise.tokens(whole)[1] == pytest.approx(1.5)
    promise.ask(torch.full((32, 4), 0.1))
    assert promise.tokens(whole)[1] == pytest.approx(1.1)
    assert promise.tokens(whole, 2)[1] == pytest.approx(1.9)
