"""Prompts that wait for others, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dflash_plugin.adaptive.policy import MOST_WAITED, VerifyLenPolicy
from dflash_plugin.vllm.adaptive import AdaptiveManager
from dflash_plugin.vllm.waiting_prompts import hold_prompts_back, prompts_wait

SLOTS = 128


class Scheduler:
    """As many requests as are given run and wait."""

    max_num_running_reqs = SLOTS

    def __init__(self, running: int = 64, waiting: int = 1) -> None:
        self.running = [SimpleNamespace(is_prefill_chunk=False) for _ in range(running)]
        self.waiting, self.prefill_capacity_bound = waiting, False
        self.deferred_waiting: set[int] = set()
        self.pause_state = 0
        self.scheduler_config = SimpleNamespace(prefill_schedule_interval=1)

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), self.waiting


@pytest.fixture
def manager():
    """A policy that finds it worth while to wait for a fourth prompt."""
    policy = VerifyLenPolicy((1, 2, 4, 8))
    policy.wait_below = 4
    manager = object.__new__(AdaptiveManager)
    manager.bypass, manager.policy, manager.prompts_had_slots = 8, policy, False
    return manager


def test_prompts_wait_for_others_but_not_for_long(manager):
    scheduler = Scheduler()
    found = [prompts_wait(scheduler, manager) for _ in range(MOST_WAITED + 1)]
    assert found == [True] * MOST_WAITED + [False]
    scheduler.waiting = 4
    assert not prompts_wait(scheduler, manager)
    scheduler.waiting = 3
    assert prompts_wait(scheduler, manager)
    assert manager.policy.counts()["waited"] == MOST_WAITED + 1


@pytest.mark.parametrize(
    "scheduler",
    [Scheduler(running=8), Scheduler(running=0), Scheduler(running=SLOTS), Scheduler(waiting=0)],
    ids=["a batch that bypasses the choice", "nothing runs", "no room", "nothing waits"],
)
def test_nothing_waits_where_waiting_saves_nothing(scheduler, manager):
    assert not prompts_wait(scheduler, manager)
    assert manager.policy.waited == 0


def test_the_rest_of_a_prompt_does_not_wait(manager):
    scheduler = Scheduler()
    scheduler.running[-1].is_prefill_chunk = True
    assert not prompts_wait(scheduler, manager)


def test_prompts_wait_for_room_for_several_of_them(manager):
    """Many wait and few have room; the last pass that read prompts left some."""
    scheduler = Scheduler(running=SLOTS - 2, waiting=50)
    scheduler.prefill_capacity_bound = True
    assert prompts_wait(scheduler, manager)
    assert not scheduler.prefill_capacity_bound
    scheduler = Scheduler(running=SLOTS - 4, waiting=50)
    scheduler.prefill_capacity_bound = True
    assert not prompts_wait(scheduler, manager)
    assert scheduler.prefill_capacity_bound


def test_prompts_that_lack_memory_do_not_wait_for_others(manager):
    """The last pass left prompts that had slots; once it leaves none, they wait for others."""
    scheduler = Scheduler(waiting=2)
    for _ in range(MOST_WAITED + 1):
        prompts_wait(scheduler, manager)
    waited = manager.policy.waited
    scheduler.prefill_capacity_bound = True
    assert not any(prompts_wait(scheduler, manager) for _ in range(5))
    assert manager.policy.waited == waited
    scheduler.prefill_capacity_bound = False
    assert prompts_wait(scheduler, manager)


@pytest.mark.parametrize(
    "change",
    [
        {"deferred_waiting": {0}},
        {"pause_state": 1},
        {"scheduler_config": SimpleNamespace(prefill_schedule_interval=16)},
    ],
    ids=["its grammar compiles", "nothing may start", "vLLM's own interval"],
)
def test_prompts_that_wait_for_something_else_are_left_alone(manager, change):
    scheduler = Scheduler()
    scheduler.prefill_capacity_bound = True
    vars(scheduler).update(change)
    assert not prompts_wait(scheduler, manager)
    assert scheduler.prefill_capacity_bound
    assert manager.policy.waited == 0


def executor(manager=None):
    """One whose worker is in this process; ``manager`` is its runner's."""
    runner = SimpleNamespace(adaptive_verification=manager)
    worker = SimpleNamespace(model_runner=runner)
    return SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))


def test_a_core_holds_prompts_back_for_its_own_worker_or_as_vllm_does(manager):
    core = SimpleNamespace(scheduler=Scheduler(), model_executor=executor(manager))
    assert hold_prompts_back(lambda self: False)(core)
    core.model_executor = executor()
    assert not hold_prompts_back(lambda self: False)(core)
    assert hold_prompts_back(lambda self: True)(core)


@pytest.mark.parametrize(
    "elsewhere",
    [
        SimpleNamespace(),
        SimpleNamespace(driver_worker=None),
        SimpleNamespace(driver_worker=SimpleNamespace(worker=SimpleNamespace())),
        executor(SimpleNamespace(policy=None)),
    ],
    ids=["other processes", "shut down", "another worker", "vLLM's own manager"],
)
def test_without_a_manager_of_this_project_nothing_waits(elsewhere):
    core = SimpleNamespace(scheduler=Scheduler(), model_executor=elsewhere)
    assert not hold_prompts_back(lambda self: False)(core)
