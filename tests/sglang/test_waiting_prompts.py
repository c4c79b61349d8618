"""Prompts that wait for others, without SGLang."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dflash_plugin.adaptive.policy import MOST_WAITED
from dflash_plugin.serving.adaptive_setup import VerifyBudget
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.sglang.adaptive import AdaptiveVerifier
from dflash_plugin.sglang.waiting_prompts import let_prompts_wait

RUNNING = 64


class NativeDelayer:
    """SGLang's own, which waits for four free slots."""

    def should_delay(self, *, running_bs: int, num_allocatable_reqs: int) -> bool:
        return running_bs > 0 and num_allocatable_reqs < 4


@pytest.fixture
def scheduler():
    return SimpleNamespace(waiting_queue=[], min_free_slots_delayer=None)


@pytest.fixture
def verifier():
    device = torch.device("cpu")
    made = AdaptiveVerifier(VerifyBudget(Options(), 7, RUNNING, device), 8, RUNNING, device)
    made.bypass = 8
    return made


def asks(scheduler, waiting: int, running: int = RUNNING, free: int = 100) -> bool:
    scheduler.waiting_queue = [None] * waiting
    return scheduler.min_free_slots_delayer.should_delay(
        running_bs=running, num_allocatable_reqs=free
    )


def test_prompts_wait_for_others_but_not_for_long(scheduler, verifier):
    let_prompts_wait(scheduler, verifier)
    assert verifier.policy.may_wait
    assert not asks(scheduler, 1)
    verifier.policy.wait_below = 4
    assert [asks(scheduler, 1) for _ in range(MOST_WAITED + 1)] == [True] * MOST_WAITED + [False]
    # The next ones may wait as long again.
    assert [asks(scheduler, waiting) for waiting in (1, 2, 3)] == [True] * 3
    assert not asks(scheduler, 3)
    assert [asks(scheduler, waiting) for waiting in (2, 4)] == [True, False]
    assert verifier.policy.counts()["waited"] == 2 * MOST_WAITED + 1


@pytest.mark.parametrize(
    ("running", "free", "waiting"),
    [(8, 100, 1), (0, 100, 1), (RUNNING, 2, 2)],
    ids=["a batch that bypasses the choice", "nothing runs", "no slot for another prompt"],
)
def test_nothing_waits_where_waiting_saves_nothing(scheduler, verifier, running, free, waiting):
    let_prompts_wait(scheduler, verifier)
    verifier.policy.wait_below = 4
    assert not asks(scheduler, waiting, running, free)


def test_prompts_wait_where_sglang_lets_them(scheduler, verifier):
    scheduler.min_free_slots_delayer = NativeDelayer()
    let_prompts_wait(scheduler, verifier)
    assert all(asks(scheduler, 1, free=3) for _ in range(2 * MOST_WAITED))
    assert not asks(scheduler, 1, free=4)
    assert verifier.policy.waited == 0
