"""A policy and a selection of drafts within the options' limits."""

from __future__ import annotations

import pytest
import torch

from dflash_plugin.adaptive.expected_tokens import ASKED
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.adaptive_setup import DraftSelection, make_policy
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
