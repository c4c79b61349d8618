"""Prompts that wait a few decode steps for others, so that one pass reads them together.

With many requests one of them ends in most decode steps, and SGLang reads the next one's prompt
right away: a pass of its own, for which all other requests wait, and which takes half as long as a
decode step for one short prompt. SGLang lets prompts wait for DFLASH, too, but only where the
server's slots for requests (``--max-running-requests``) are taken but for a few.
"""

from __future__ import annotations

from typing import Any, Protocol

from dflash_plugin.sglang.adaptive import AdaptiveVerifier


class Delayer(Protocol):
    """``MinFreeSlotsDelayer``: whether waiting prompts wait for a step more."""

    def should_delay(self, *, running_bs: int, num_allocatable_reqs: int) -> bool:
        """Asked once before each step, if a prompt waits."""
        ...


class SchedulerLike(Protocol):
    """``Scheduler``: holds the prompts that wait."""

    waiting_queue: list[Any]
    min_free_slots_delayer: Delayer | None


class WaitingPrompts:
    """Lets prompts wait where SGLang does, and where the policy expects to save time by it.

    Args:
        scheduler: whose prompts they are.
        verifier: whose policy knows what a step and a pass of prompts take. All ranks of a server
            let the same prompts wait: they agree on the policy's number.
    """

    def __init__(self, scheduler: SchedulerLike, verifier: AdaptiveVerifier) -> None:
        self.scheduler, self.verifier = scheduler, verifier
        self.native = scheduler.min_free_slots_delayer

    def should_delay(self, *, running_bs: int, num_allocatable_reqs: int) -> bool:
        """Whether the prompts that wait do so for one more step.

        Args:
            running_bs: requests that decode.
            num_allocatable_reqs: slots for requests that are free.
        """
        if self.native is not None and self.native.should_delay(
            running_bs=running_bs, num_allocatable_reqs=num_allocatable_reqs
        ):
            return True
        if not self.verifier.predicts(running_bs):
            return False
        return self.verifier.policy.let_wait(
            len(self.scheduler.waiting_queue), num_allocatable_reqs
        )


def let_prompts_wait(scheduler: SchedulerLike, verifier: AdaptiveVerifier) -> None:
    """Let a scheduler's prompts wait for others where that saves time."""
    verifier.policy.may_wait = True
    scheduler.min_free_slots_delayer = WaitingPrompts(scheduler, verifier)
