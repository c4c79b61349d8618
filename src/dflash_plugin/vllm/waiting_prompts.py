"""Prompts that wait a few steps for others, so that one step reads them together.

vLLM reads prompts in the pass that verifies drafts. All requests wait for it, longest where no
graph holds the whole pass (``prompt_graphs``), so that the host launches it layer by layer. With
many requests one of them ends in nearly every step, and the next one's prompt comes. vLLM can hold
prompts back, so that ranks of data parallelism read theirs in the same steps; here they are held
back for each other.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from functools import wraps
from typing import Any, Protocol

from dflash_plugin.vllm.adaptive import AdaptiveManager, of_runner
from dflash_plugin.vllm.protocols import Method


class RequestLike(Protocol):
    """``Request``: whether a part of its prompt is still to be read."""

    is_prefill_chunk: bool


class SchedulerConfigLike(Protocol):
    """``SchedulerConfig``: the user's own interval of steps between those that read prompts."""

    prefill_schedule_interval: int


class SchedulerLike(Protocol):
    """``Scheduler``: the requests that run, how many may, and whether prompts lacked room.

    ``deferred_waiting`` are those of the requests that wait that something other than room kept
    from running: a grammar that compiles, a KV transfer, adapters in use.
    """

    running: Sequence[RequestLike]
    deferred_waiting: Sized
    max_num_running_reqs: int
    prefill_capacity_bound: bool
    scheduler_config: SchedulerConfigLike

    @property
    def pause_state(self) -> int:
        """0 where requests may start."""
        ...

    def get_request_counts(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        ...


def hold_prompts_back(native: Method) -> Method:
    """``EngineCore._should_throttle_prefills``, with prompts that wait where that saves time.

    The policy is in the worker: where that is a process of its own, prompts do not wait.
    """

    @wraps(native)
    def should_throttle_prefills(self: Any) -> bool:
        return bool(native(self)) or prompts_wait(self.scheduler, manager_of(self.model_executor))

    return should_throttle_prefills


def manager_of(executor: Any) -> AdaptiveManager | None:
    """The manager of an executor's worker, or None where that is in another process or has none.

    Args:
        executor: vLLM's, of any kind. That of a worker in this process has ``driver_worker``.
    """
    found = executor
    for name in ("driver_worker", "worker", "model_runner"):
        found = vars(found).get(name)
        if found is None:
            return None
    return of_runner(found)


def prompts_wait(scheduler: SchedulerLike, manager: AdaptiveManager | None) -> bool:
    """Whether the prompts that wait do so for one more step.

    Args:
        scheduler: whose prompts they are.
        manager: whose policy knows what a step takes and what prompts add; None where there is
            none.
    """
    if manager is None:
        return False
    running, waiting = scheduler.get_request_counts()
    waiting -= len(scheduler.deferred_waiting)
    slots = scheduler.max_num_running_reqs - running
    # The last pass left prompts that had slots: they wait for memory, not for other prompts.
    lack_memory = scheduler.prefill_capacity_bound and manager.prompts_had_slots
    manager.prompts_had_slots = waiting <= slots
    ready = min(waiting, slots)
    if ready <= 0 or running <= manager.bypass or lack_memory:
        return False
    # vLLM's interval between prompts ends where prompts lack room, which is unmarked below.
    if scheduler.pause_state or scheduler.scheduler_config.prefill_schedule_interval > 1:
        return False
    # vLLM would hold back the rest of a prompt that it reads in parts, too.
    if any(request.is_prefill_chunk for request in scheduler.running):
        return False
    waits = manager.policy.let_wait(ready, scheduler.max_num_running_reqs)
    if waits:
        # vLLM reads prompts at once where the last pass that read some had no room for all. They
        # wait here for a few steps at most. The pass that ends it sets the mark again.
        scheduler.prefill_capacity_bound = False
    return waits
