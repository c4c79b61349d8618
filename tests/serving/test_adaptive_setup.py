"""A policy and a selection of drafts within the options' limits."""

from __future__ import annotations

import pytest
import torch

from dflash_plugin.adaptive.expected_tokens import ASKED
from dflash_plugin.adaptive.step_times import Step
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.adaptive_setup import (
    DraftSelection,
    VerifyBudget,
    bypass_of,
    make_policy,
    milliseconds,
    short_block,
)
from dflash_plugin.serving.drafter_spec import Options

CPU = torch.device("cpu")


def test_a_policy_has_the_options_limits():
    policy = make_policy(Options(min_draft_tokens=1, max_draft_tokens=4), 7)
    assert (policy.verify_lens[0], policy.verify_lens[-1]) == (2, 5)
    assert make_policy(Options(), 7).verify_lens[-1] == 8
    assert make_policy(Options(), 7, expected=list).expected() == []
    with pytest.raises(DFlashError, match="min_draft_tokens is 8"):
        make_policy(Options(min_draft_tokens=8), 7)


def admitted(options: Options, probabilities: torch.Tensor, budget: int) -> list[int]:
    batch, drafts = probabilities.shape
    count = torch.full((batch,), drafts, dtype=torch.int32)
    found, others = torch.zeros_like(count), torch.ones_like(count)
    starts = torch.zeros(2, batch + 1, dtype=torch.int32)
    DraftSelection(options, drafts, batch, CPU).admit(
        probabilities, torch.arange(batch), count, others, budget, found, *starts
    )
    return found.tolist()


def test_drafts_are_selected_within_the_options_limits():
    """One request's drafts are likelier than the other's."""
    probabilities = torch.tensor([[0.9, 0.9, 0.9], [0.1, 0.1, 0.1]])
    assert admitted(Options(), probabilities, 3) == [3, 0]
    assert admitted(Options(min_draft_tokens=1), probabilities, 3) == [2, 1]
    assert admitted(Options(max_draft_tokens=2), probabilities, 3) == [2, 1]


def test_expected_tokens_follow_the_probabilities_of_some_steps():
    selection, asked = DraftSelection(Options(), 2, 64, CPU), []

    def probabilities() -> torch.Tensor:
        asked.append(1)
        return torch.full((64, 2), 0.5)

    def expected() -> list[float]:
        return selection.expected(lambda verify_len: verify_len - 1)

    before = expected()
    for _ in range(ASKED - 1):
        selection.observe(probabilities)
    assert asked == []
    assert expected() == before
    selection.observe(probabilities)
    assert asked == [1]
    assert expected() == pytest.approx([1.0, 1.5, 1.75])
    # More drafts than rows ask for, as where a captured pass has room.
    assert selection.expected(lambda verify_len: 2.0) == pytest.approx([1.75] * 3)


def test_costs_of_shorter_blocks_have_their_own_draft_passes():
    """A row takes 1 ms to verify, a whole block 4 ms to draft and a shorter one 1 ms."""
    budget = VerifyBudget(Options(), 7, 4, CPU)
    assert budget.short == 4
    budget.draft_short_blocks()
    budget.capture_sizes = [4, 8, 12, 16, 24, 32]
    verifying = {rows: 0.001 * rows for rows in budget.capture_sizes}
    budget.set_costs([4], verifying, {4: 0.004}, drafting_short={4: 0.001})
    prior = budget.policy.times.prior
    assert prior[Step(4, 2, 8)] == pytest.approx(0.012)
    assert prior[Step(4, 2, 4)] == pytest.approx(0.009)
    assert prior[Step(4, 4, 4)] == pytest.approx(0.017)
    assert Step(4, 6, 4) not in prior
    # A batch of short blocks has no more drafts than these, however many rows a pass holds.
    budget.capture_sizes = [32]
    assert budget.drafts_to_verify(2, 4, 4, 4) == 12
    assert budget.drafts_to_verify(2, 4, 4) == 28


def test_a_pass_that_was_disturbed_when_it_was_measured_does_not_make_longer_ones_dear():
    """Sixteen rows took 90 ms while something else ran; twice as many take 8 ms."""
    budget = VerifyBudget(Options(), 7, 4, CPU)
    budget.capture_sizes = [4, 8, 16, 32]
    verifying = {4: 0.004, 8: 0.005, 16: 0.09, 32: 0.008}
    budget.set_costs([4], verifying, {4: 0.001}, {1: 0.07, 4: 0.009})
    prior = budget.policy.times.prior
    assert prior[Step(4, 2, 8)] == pytest.approx(0.006)
    assert prior[Step(4, 4, 8)] == pytest.approx(0.009)
    assert prior[Step(4, 8, 8)] == pytest.approx(0.010)
    # One request alone was disturbed: passes of up to 4 take as long as one.
    assert bypass_of({1: 0.07, 2: 0.009, 4: 0.0095, 8: 0.02}) == 4
    assert milliseconds({8: 0.0051, 4: 0.004}) == "4: 4.00, 8: 5.10"


def test_a_limit_of_drafts_leaves_whole_blocks_whole():
    """Four rows are verified at most; they may come from blocks of 8 or of 4."""
    budget = VerifyBudget(Options(max_draft_tokens=3), 7, 4, CPU)
    budget.draft_short_blocks()
    policy = budget.policy
    assert policy.block == policy.draft_len == 8
    assert policy.choices == [(1, 8), (2, 8), (4, 8), (2, 4), (4, 4)]


def test_blocks_of_few_rows_are_not_halved():
    assert [short_block(rows) for rows in (2, 4, 7, 8, 15, 16)] == [None, None, None, 4, 7, 8]
    with pytest.raises(ValueError, match="no shorter one"):
        VerifyBudget(Options(), 3, 4, CPU).draft_short_blocks()
