"""Replays traces under a policy, on a machine whose step times are given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_plugin.budget.acceptance import AcceptanceModel
from dflash_plugin.budget.allocate import allocate
from dflash_plugin.budget.cost import StepCost
from dflash_plugin.budget.traces import Traces


class Policy(ABC):
    """Chooses how many drafts of each request to verify."""

    @abstractmethod
    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """Drafts int64 [B] of this step, or None to step without a draft pass.

        Args:
            confidences: float32 [B, K].
            right: int64 [B], how many drafts would stand, which only an oracle may look at.
        """

    def observe(self, confidences: Tensor, accepted: Tensor, verified: Tensor) -> None:  # noqa: B027
        """Learn what came of it, if there is anything; arguments as ``AcceptanceModel``'s."""


class Fixed(Policy):
    """The same number of drafts for all; 0 steps without drafting."""

    def __init__(self, count: int) -> None:
        self.count = count

    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """That number."""
        if self.count == 0:
            return None
        return torch.full((len(right),), min(self.count, confidences.shape[1]))


class _Allocating(Policy):
    """Allocates by some survival, and steps without drafting where that is faster."""

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost

    def _allocate(self, survival: Tensor) -> Tensor | None:
        batch = survival.shape[0]
        sizes = [size for size in sorted(self.cost.verify) if size >= batch]
        seconds = [self.cost.step_seconds(size, batch) for size in sizes]
        made = allocate(survival, torch.tensor(sizes), torch.tensor(seconds))
        plain = batch / self.cost.step_seconds(batch, 0)
        return None if float(made.rate) < plain else made.num_drafts


class Oracle(_Allocating):
    """Knows what would stand, and verifies the best of it."""

    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """The drafts that stand, as far as they pay."""
        place = torch.arange(confidences.shape[1])
        return self._allocate((place < right[:, None]).float())


class Adaptive(_Allocating):
    """Allocates by the acceptance model, and probes now and then while it does not draft.

    Args:
        cost: of steps.
        num_drafts: K.
        first_pause: steps without drafting before the first probe; every probe that does not pay
            doubles the pause, up to ``longest_pause``.
    """

    def __init__(
        self, cost: StepCost, num_drafts: int, first_pause: int = 16, longest_pause: int = 256
    ) -> None:
        super().__init__(cost)
        self.model = AcceptanceModel(num_drafts)
        self.first_pause, self.longest_pause = first_pause, longest_pause
        self.pause, self.waiting = first_pause, 0

    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """What pays; while nothing does, mostly no draft pass."""
        if self.waiting > 0:
            self.waiting -= 1
            return None
        chosen = self._allocate(self.model.survival(confidences))
        if chosen is not None:
            self.pause = self.first_pause
            return chosen
        self.waiting = self.pause
        self.pause = min(2 * self.pause, self.longest_pause)
        # The draft pass of this step is spent: one draft each tells what it was worth.
        return torch.ones(len(right), dtype=torch.int64)

    def observe(self, confidences: Tensor, accepted: Tensor, verified: Tensor) -> None:
        """Calibrate."""
        self.model.observe(confidences, accepted, verified)


@dataclass(frozen=True)
class Run:
    """What a policy made of traces.

    Attributes:
        tokens: committed.
        seconds: of all steps.
        steps: how many.
        verified, accepted: drafts.
    """

    tokens: int
    seconds: float
    steps: int
    verified: int
    accepted: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def simulate(
    traces: Traces, policy: Policy, cost: StepCost, requests: int, steps: int, seed: int = 0
) -> Run:
    """Keep ``requests`` texts running for so many steps; one that ends makes place for another.

    Args:
        traces: texts are taken from it at random, again and again.
        policy: what to verify.
        cost: what steps take.
        requests: at the same time.
        steps: to run.
        seed: of the choice of texts and of where the first of them begin.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(traces.starts) - 1

    def draw(size: int) -> tuple[Tensor, Tensor]:
        text = torch.randint(count, (size,), generator=generator)
        return traces.starts[text].clone(), traces.starts[text + 1]

    place, end = draw(requests)
    # Texts do not begin together.
    place = place + (torch.rand(requests, generator=generator) * (end - place)).long()
    tokens = verified = accepted = 0
    seconds = 0.0
    for _ in range(steps):
        confidences, right = traces.confidence[place].float(), traces.right[place]
        chosen = policy.choose(confidences, right)
        drafts = torch.zeros_like(right) if chosen is None else chosen
        stood = torch.minimum(right, drafts)
        if chosen is not None:
            # What lies behind a text's end is no verdict on a draft.
            policy.observe(confidences, stood, torch.minimum(drafts, end - place))
        committed = torch.minimum(stood + 1, end - place)
        size = requests + int(drafts.sum())
        seconds += cost.step_seconds(size, 0 if chosen is None else requests)
        tokens += int(committed.sum())
        verified, accepted = verified + int(drafts.sum()), accepted + int(stood.sum())
        place = place + committed
        done = place >= end
        if bool(done.any()):
            fresh, last = draw(int(done.sum()))
            place[done], end[done] = fresh, last
    return Run(tokens, seconds, steps, verified, accepted)


def compare(traces: Traces, cost: StepCost, requests: Sequence[int]) -> dict[int, dict[str, Run]]:
    """Every fixed number of drafts, the adaptive policy and the oracle, by requests at once."""
    found: dict[int, dict[str, Run]] = {}
    for level in requests:
        policies: dict[str, Policy] = {
            **{f"fixed {k}": Fixed(k) for k in range(traces.num_drafts + 1)},
            "adaptive": Adaptive(cost, traces.num_drafts),
            "oracle": Oracle(cost),
        }
        found[level] = {
            name: simulate(traces, policy, cost, level, max(100, 20_000 // level))
            for name, policy in policies.items()
        }
    return found
