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


def test_blocks_of_two_lengths_are_compared_at_the_same_time():
    promise, whole = ExpectedTokens(4, 32, CPU), [0, 1, 2, 3, 4]
    promise.add_short_blocks(2)
    assert promise.tokens(whole, 2)[2:] == promise.tokens(whole)[2:3] * 3
    # At first as the first drafts of a whole block.
    promise.ask(torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(32, 1))
    assert promise.tokens(whole, 2) == pytest.approx([1, 1.5, 1.75, 1.75, 1.75])
    assert promise.tokens(whole) == pytest.approx([1, 1.5, 1.75, 2.0, 2.25])
    # A shorter block drafts as well as these: both are what they were.
    promise.ask(torch.full((32, 2), 0.5))
    assert promise.tokens(whole, 2) == pytest.approx([1, 1.5, 1.75, 1.75, 1.75])
    assert promise.tokens(whole) == pytest.approx([1, 1.5, 1.75, 2.0, 2.25])
    # The text gets easier while shorter blocks are drafted: whole ones would gain as much.
    promise.ask(torch.full((32, 2), 0.8))
    assert promise.tokens(whole, 2) == pytest.approx([1, 1.8, 2.44, 2.44, 2.44])
    assert promise.tokens(whole) == pytest.approx([1, 1.8, 2.44, 2.92, 3.4])
    # Few requests, as at the end of a load, are not compared with many.
    for requests, drafts in ((8, 4), (32, 2)):
        promise.ask(torch.full((requests, drafts), 0.1 if drafts == 4 else 0.5))
        promise.tokens(whole)
    assert promise.tokens(whole, 2) == pytest.approx([1, 1.5, 1.75, 1.75, 1.75])
    # And harder, while whole ones are.
    promise.ask(torch.full((32, 4), 0.5))
    assert promise.tokens(whole, 2) == pytest.approx([1, 1.5, 1.75, 1.75, 1.75])


def test_a_drafter_that_does_worse_in_shorter_blocks_is_found_out():
    promise, whole = ExpectedTokens(4, 32, CPU), [0, 1, 2, 3, 4]
    promise.add_short_blocks(2)
    for _ in range(20):  # In turns, as trials come.
        promise.ask(torch.full((32, 4), 0.8))
        promise.tokens(whole)
        promise.ask(torch.full((32, 2), 0.4))
        assert promise.tokens(whole, 2) == pytest.approx([1, 1.4, 1.56, 1.56, 1.56])
    # While whole blocks are drafted, shorter ones keep their disadvantage of 0.56 / 1.44.
    promise.ask(torch.full((32, 4), 0.8))
    assert promise.tokens(whole, 2)[2] == pytest.approx(1.56, rel=0.02)
    promise.ask(torch.full((32, 4), 0.9))
    assert promise.tokens(whole, 2)[2] == pytest.approx(1 + 1.71 * 0.56 / 1.44, rel=0.02)
    # And while shorter ones are, whole ones their advantage.
    promise.ask(torch.full((32, 2), 0.4))
    assert promise.tokens(whole)[4] > 1.5 * promise.tokens(whole, 2)[4]


def test_predictions_that_get_better_all_the_while_favour_no_length():
    """As they are learnt; in turns, the later one would look better each time."""
    promise, whole = ExpectedTokens(4, 32, CPU), [0, 1, 2, 3, 4]
    promise.add_short_blocks(2)
    for turn in range(40):
        for later, drafts in ((0.0, 4), (0.01, 2)):
            promise.ask(torch.full((32, drafts), 0.3 + 0.01 * turn + later))
            promise.tokens(whole)
    promise.ask(torch.full((32, 4), 0.7))
    assert promise.tokens(whole, 2)[2] == pytest.approx(1 + 0.7 + 0.49, rel=0.02)
