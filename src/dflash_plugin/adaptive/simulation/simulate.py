"""Replays traces under a policy, with given step times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
from torch import Tensor

from dflash_plugin.adaptive.acceptance_model import AcceptanceModel
from dflash_plugin.adaptive.policy import VerifyLenPolicy, choose_verify_lens
from dflash_plugin.adaptive.simulation.allocate import Allocation, allocate
from dflash_plugin.adaptive.simulation.traces import Traces
from dflash_plugin.adaptive.step_cost import StepCost


class Policy(ABC):
    """Chooses how many drafts of each request to verify."""

    @abstractmethod
    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """Drafts int64 [B] of this step, or None to step without a draft pass.

        Args:
            confidences: float32 [B, K].
            right: int64 [B], how many drafts would be accepted; only an oracle may look at it.
        """

    def observe(self, confidences: Tensor, accepted: Tensor, verified: Tensor) -> None:  # noqa: B027
        """Learn from the step; arguments as ``AcceptanceModel.observe``'s."""

    def elapsed(self, seconds: float) -> None:  # noqa: B027
        """Learn what the step took."""


class Fixed(Policy):
    """The same number of drafts for all; 0 steps without drafting."""

    def __init__(self, count: int) -> None:
        self.count = count

    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """That number."""
        if self.count == 0:
            return None
        return torch.full((len(right),), min(self.count, confidences.shape[1]))


class ByStep(Policy):
    """The same number of drafts for all, chosen for each step by outcomes and the clock.

    Args:
        num_drafts: K.
    """

    def __init__(self, num_drafts: int) -> None:
        self.policy = VerifyLenPolicy(choose_verify_lens(num_drafts + 1, 0, None))
        self.now, self.rows = 0.0, 0

    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """One verify length for all, by ``VerifyLenPolicy``."""
        self.rows = self.policy.choose(len(right), self.now)
        return None if self.rows == 1 else torch.full((len(right),), self.rows - 1)

    def observe(self, confidences: Tensor, accepted: Tensor, verified: Tensor) -> None:
        """Learn from requests that are not at their end."""
        self.policy.observe(self.rows, accepted[verified == self.rows - 1].tolist())

    def elapsed(self, seconds: float) -> None:
        """Move the clock."""
        self.now += seconds


class _Allocating(Policy):
    """Allocates by some survival."""

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost

    def _allocate(self, survival: Tensor) -> Allocation:
        batch = survival.shape[0]
        sizes = [size for size in sorted(self.cost.verify) if size >= batch]
        seconds = [self.cost.step_seconds(size, batch) for size in sizes]
        return allocate(survival, torch.tensor(sizes), torch.tensor(seconds))

    def _plain(self, requests: int) -> float:
        """Tokens a second without drafting."""
        return requests / self.cost.step_seconds(requests, 0)


class Oracle(_Allocating):
    """Knows which drafts are correct, and verifies those that pay or steps without drafting."""

    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """The correct drafts, as far as they pay."""
        position = torch.arange(confidences.shape[1])
        made = self._allocate((position < right[:, None]).float())
        return None if float(made.rate) < self._plain(len(right)) else made.num_drafts


class Adaptive(_Allocating):
    """Allocates by the acceptance model, and probes now and then while it does not draft.

    A step's draft pass is spent by the time its drafts are known, so that one bad block is no
    reason to stop: what steps commit a second on average is.

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
        self.rate: float | None = None

    def choose(self, confidences: Tensor, right: Tensor) -> Tensor | None:
        """What pays; while nothing does, mostly no draft pass."""
        if self.waiting > 0:
            self.waiting -= 1
            return None
        requests = len(right)
        made = self._allocate(self.model.survival(confidences))
        now, plain = float(made.rate), self._plain(requests)
        # The more requests, the less one step differs from the next.
        share = 0.02 + 0.5 * min(1.0, requests / 256)
        self.rate = now if self.rate is None else self.rate + share * (now - self.rate)
        if max(self.rate, now) >= plain:
            self.pause = self.first_pause
            return made.num_drafts
        self.waiting, self.rate = self.pause, None
        self.pause = min(2 * self.pause, self.longest_pause)
        # One draft each tells at least what it was worth.
        return made.num_drafts.clamp(min=1)

    def observe(self, confidences: Tensor, accepted: Tensor, verified: Tensor) -> None:
        """Calibrate."""
        self.model.observe(confidences, accepted, verified)


@dataclass(frozen=True)
class Run:
    """Totals of one replay.

    Attributes:
        tokens: committed.
        seconds: of all steps.
        steps: how many.
        verified, accepted: drafts.
        easy_tokens: of those tokens, the easy half's in a mixed run.
    """

    tokens: int
    seconds: float
    steps: int
    verified: int
    accepted: int
    easy_tokens: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def simulate(
    traces: Traces,
    policy: Policy,
    cost: StepCost,
    requests: int,
    steps: int,
    seed: int = 0,
    mixed: bool = False,
) -> Run:
    """Keep ``requests`` texts running for so many steps; a text that ends is replaced by another.

    Args:
        traces: texts are taken from it at random, again and again.
        policy: what to verify.
        cost: what steps take.
        requests: at the same time.
        steps: to run.
        seed: of the choice of texts and of where the first of them begin.
        mixed: the first half of the requests takes its texts from the half with the most
            accepted drafts, the second half from the others.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(traces.starts) - 1
    order = torch.tensor(_by_ease(traces)) if mixed else torch.arange(count)
    half = requests // 2

    def draw(slots: Tensor) -> tuple[Tensor, Tensor]:
        number = torch.randint(count, (len(slots),), generator=generator)
        if mixed:
            number = number // 2 + (slots >= half) * (count // 2)
        text = order[number]
        return traces.starts[text].clone(), traces.starts[text + 1]

    position, end = draw(torch.arange(requests))
    # Texts do not begin together.
    position = position + (torch.rand(requests, generator=generator) * (end - position)).long()
    tokens = verified = accepted = easy = 0
    seconds = 0.0
    for _ in range(steps):
        confidences, right = traces.confidence[position].float(), traces.right[position]
        chosen = policy.choose(confidences, right)
        drafts = torch.zeros_like(right) if chosen is None else chosen
        correct = torch.minimum(right, drafts)
        if chosen is not None:
            # Drafts after a text's end were not judged.
            policy.observe(confidences, correct, torch.minimum(drafts, end - position))
        committed = torch.minimum(correct + 1, end - position)
        size = requests + int(drafts.sum())
        took = cost.step_seconds(size, 0 if chosen is None else requests)
        seconds += took
        policy.elapsed(took)
        tokens += int(committed.sum())
        easy += int(committed[:half].sum()) if mixed else 0
        verified, accepted = verified + int(drafts.sum()), accepted + int(correct.sum())
        position = position + committed
        done = position >= end
        if bool(done.any()):
            position[done], end[done] = draw(done.nonzero()[:, 0])
    return Run(tokens, seconds, steps, verified, accepted, easy)


def _by_ease(traces: Traces) -> list[int]:
    """Indices of the texts, those with the most accepted drafts first."""
    bounds = zip(traces.starts.tolist(), traces.starts[1:].tolist(), strict=False)
    correct = [float(traces.right[start:end].float().mean()) for start, end in bounds]
    return sorted(range(len(correct)), key=correct.__getitem__, reverse=True)


def compare(
    traces: Traces, cost: StepCost, requests: Sequence[int], seeds: int = 1, mixed: bool = False
) -> dict[int, dict[str, Run]]:
    """Every fixed number of drafts, the policies and the oracle, by requests at once.

    Args:
        traces: to replay.
        cost: of steps.
        requests: levels.
        seeds: replays of each policy, which starts fresh in each; the sums are returned.
        mixed: half the requests are easy, half hard (``simulate``).
    """
    count = traces.num_drafts
    makers: dict[str, Callable[[], Policy]] = {
        **{f"fixed {k}": partial(Fixed, k) for k in range(count + 1)},
        "by step": partial(ByStep, count),
        "adaptive": partial(Adaptive, cost, count),
        "oracle": partial(Oracle, cost),
    }
    found: dict[int, dict[str, Run]] = {}
    for level in requests:
        steps = max(600, 20_000 // level)
        found[level] = {
            name: _sum(
                simulate(traces, make(), cost, level, steps, seed, mixed) for seed in range(seeds)
            )
            for name, make in makers.items()
        }
    return found


def _sum(runs: Iterable[Run]) -> Run:
    columns = zip(*(astuple(run) for run in runs), strict=True)
    return Run(*(sum(column) for column in columns))
