"""The Transformers engine with adaptive verification: the target's own text, whatever is chosen."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest

from dflash_plugin.transformers import Engine, Request
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target
from tests.transformers.test_engine import (
    FEW,
    check_sampled_pairs,
    greedy,
    perfect_drafter,
    prompts_of,
)

TURNS = [None, (1,), (1, 4, 1, 1, 3), (3, 2, 4)]


def adapting(target: Any, drafter: Any, turns: Any, **options: Any) -> Engine:
    """An engine whose passes have rows by turns; None lets the policy choose."""
    engine = Engine(target, drafter, adaptive=True, **options)
    assert engine.policy is not None
    if turns is not None:
        rows, choose = cycle(turns), engine.policy.choose
        engine.policy.choose = lambda *args: choose(*args) and next(rows)
    return engine


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("changes", [{}, {"sample_from_anchor": True, "block_size": 3}, DFLASH2])
def test_greedy_text_is_the_targets(turns, changes):
    target, prompts = tiny_target("qwen3"), prompts_of(7)
    for batch in (1, 4):
        engine = adapting(target, tiny_drafter(**changes), turns, max_batch=batch, max_length=72)
        if changes and turns is not None:
            rows = cycle(min(row, engine.num_drafts + 1) for row in turns)
            engine.policy.choose = lambda *_, rows=rows: next(rows)
        found = engine.generate([Request(prompt, 24, stop_ids=[]) for prompt in prompts])
        assert [r.tokens for r in found] == [greedy(target, prompt, 24) for prompt in prompts]
        for result in found:
            assert 1 + sum(result.committed) == len(result.tokens)


def test_the_drafter_sees_every_position_once_behind_passes_that_did_not_draft():
    target, drafter, prompt = tiny_target(), tiny_drafter(), prompts_of(1)[0]
    injected: list[int] = []
    inject = drafter.inject

    def recording(features, positions):
        injected.extend(positions[positions >= 0].tolist())
        return inject(features, positions)

    drafter.inject = recording
    engine = adapting(target, drafter, (1, 1, 4, 2, 1), max_length=80)
    text = engine.generate([Request(prompt, 30, stop_ids=[])])[0].tokens
    assert injected == sorted(set(injected))
    # What the last pass committed is injected by the next, which does not come.
    assert len(prompt) + len(text) - 5 <= len(injected) <= len(prompt) + len(text)


@pytest.mark.parametrize(
    ("draft_sampling", "changes"),
    [("probabilistic", {}), ("greedy", {}), ("probabilistic", DFLASH2), ("greedy", DFLASH2)],
)
def test_sampled_pairs_follow_the_target(draft_sampling, changes):
    target, drafter = tiny_target(**FEW), tiny_drafter(**FEW, target_hidden_size=16, **changes)
    engine = adapting(
        target, drafter, (2, 1, 3), max_batch=2048, max_length=8, draft_sampling=draft_sampling
    )
    check_sampled_pairs(target, engine, 16_000)


def test_what_was_accepted_is_learnt():
    target = tiny_target()
    prompt = prompts_of(1)[0]
    answer = greedy(target, prompt, 60)
    engine = Engine(target, perfect_drafter(prompt, answer), max_length=120, adaptive=True)
    result = engine.generate([Request(prompt, 60, stop_ids=[])])[0]
    assert result.tokens == answer
    assert engine.policy is not None
    assert engine.policy.expected()[engine.num_drafts] > 3.3


def test_without_a_drafter_there_is_nothing_to_adapt():
    assert Engine(tiny_target(), None, max_length=80, adaptive=True).policy is None
