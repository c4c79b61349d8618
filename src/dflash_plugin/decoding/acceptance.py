"""Acceptance length τ and acceptance rates by position, from counts of verify passes.

τ is the number of tokens committed per verify pass, bonus token included. The rate at position k
(1..K) is the share of verify passes that accepted the first k drafts, so that τ = 1 + the sum of
the rates where no stop token or length limit cuts a pass off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def tau(committed: float, passes: float) -> float | None:
    """Tokens committed per verify pass; None without a pass."""
    return committed / passes if passes else None


def at_least(histogram: Sequence[int]) -> list[int]:
    """Cumulative counts of a histogram.

    Args:
        histogram: [K + 1], passes that accepted exactly 0, 1, … K drafts.

    Returns:
        [K], passes that accepted at least 1, 2, … K drafts.
    """
    counts, total = [], 0
    for count in reversed(histogram[1:]):
        total += count
        counts.append(total)
    return counts[::-1]


def histogram(accepted: Iterable[int], num_drafts: int) -> list[int]:
    """Passes that accepted exactly 0, 1, … ``num_drafts`` drafts.

    Args:
        accepted: drafts that each pass accepted.
        num_drafts: K.
    """
    counts = [0] * (num_drafts + 1)
    for number in accepted:
        counts[number] += 1
    return counts


def rates(counts: Iterable[float], passes: float) -> list[float]:
    """Share of the passes at each position; 0 everywhere without a pass.

    Args:
        counts: [K], passes that accepted at least k drafts, k = 1..K.
        passes: all of them.
    """
    return [count / passes if passes else 0.0 for count in counts]


def conditional_rates(unconditional: Sequence[float]) -> list[float | None]:
    """Acceptance rate at each position among the passes that accepted all drafts before it.

    Args:
        unconditional: [K], from ``rates``.

    Returns:
        [K]; None where no pass got that far.
    """
    before = [1.0, *unconditional[:-1]]
    return [now / then if then else None for now, then in zip(unconditional, before, strict=False)]


@dataclass(frozen=True)
class Acceptance:
    """Counts of verify passes.

    Attributes:
        passes: verify passes.
        accepted: [K], passes that accepted at least k drafts, k = 1..K.
    """

    passes: float
    accepted: tuple[float, ...]

    @classmethod
    def of(cls, accepted: Iterable[int], num_drafts: int) -> Acceptance:
        """Count passes.

        Args:
            accepted: drafts that each pass accepted.
            num_drafts: K.
        """
        return cls.of_histogram(histogram(accepted, num_drafts))

    @classmethod
    def of_histogram(cls, counts: Sequence[int]) -> Acceptance:
        """From passes that accepted exactly 0, 1, … K drafts."""
        return cls(sum(counts), tuple(at_least(counts)))

    @property
    def tau(self) -> float | None:
        """Accepted drafts per verify pass, and the bonus token; None without a pass."""
        return tau(self.passes + sum(self.accepted), self.passes)

    @property
    def rates(self) -> list[float]:
        """[K], share of the passes that accepted at least k drafts; empty without a pass."""
        return rates(self.accepted, self.passes) if self.passes else []

    @property
    def conditional_rates(self) -> list[float | None]:
        """[K], the same among the passes that accepted at least k - 1 drafts."""
        return conditional_rates(self.rates)
