"""Seconds of a step, by the tokens it verifies and the requests that draft."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dflash_plugin.errors import DFlashError


@dataclass
class StepCost:
    """Seconds of verify passes by their captured size, and of draft passes by requests.

    A pass between two sizes costs what the larger does, as a captured graph does.

    Attributes:
        verify: seconds by tokens of a pass, sizes rising.
        draft: seconds by requests, sizes rising; an empty one costs nothing.
        fixed: seconds of a step outside both passes.
    """

    verify: dict[int, float]
    draft: dict[int, float] = field(default_factory=dict)
    fixed: float = 0.0

    @classmethod
    def measured(
        cls, verify: Mapping[int, float], draft: Mapping[int, float], fixed: float = 0.0
    ) -> StepCost:
        """Costs that were measured at some sizes, made ``rising``.

        Raises:
            DFlashError: none of a verify pass, or one that is no positive number.
        """
        if not verify:
            raise DFlashError("no verify pass was measured: give one size at least")
        for name, table in (("verify", verify), ("draft", draft)):
            for size, seconds in table.items():
                if size < 1 or not (math.isfinite(seconds) and seconds > 0):
                    raise DFlashError(
                        f"a {name} pass of {size} takes {seconds} s: give positive sizes and times"
                    )
        return cls(rising(verify), rising(draft), fixed)

    def verify_seconds(self, tokens: int) -> float:
        """Seconds of a verify pass of ``tokens``; beyond the largest size, in proportion."""
        return _at(self.verify, tokens)

    def draft_seconds(self, requests: int) -> float:
        """Seconds of a draft pass, 0 without requests."""
        return _at(self.draft, requests) if self.draft and requests else 0.0

    def step_seconds(self, tokens: int, drafting: int) -> float:
        """Seconds of a step.

        Args:
            tokens: verified, over all requests.
            drafting: requests that draft.
        """
        return self.fixed + self.verify_seconds(tokens) + self.draft_seconds(drafting)


def rising(measured: Mapping[int, float]) -> dict[int, float]:
    """Seconds by size, sizes rising, none of them longer than those of a larger size.

    A pass with more rows never takes less, and what disturbs a measurement makes it longer. So a
    size that took longer than a larger one was disturbed, and takes the larger one's seconds.
    """
    found: dict[int, float] = {}
    shortest = math.inf
    for size in sorted(measured, reverse=True):
        shortest = min(shortest, measured[size])
        found[size] = shortest
    return dict(sorted(found.items()))


def _size(table: Mapping[int, float], wanted: int) -> int:
    """The smallest size that holds ``wanted``, else the largest."""
    return min((size for size in table if size >= wanted), default=max(table))


def _at(table: Mapping[int, float], wanted: int) -> float:
    size = _size(table, wanted)
    return table[size] * max(1.0, wanted / size)


def interpolated(points: Mapping[int, float], sizes: Sequence[int]) -> dict[int, float]:
    """Seconds at ``sizes``, on straight lines through measured ``points``.

    Raises:
        DFlashError: fewer than two points.
    """
    known = sorted(points.items())
    if len(known) < 2:
        raise DFlashError(f"{len(known)} measured sizes: give two at least")
    found = {}
    for size in sizes:
        low, high = next(
            (pair for pair in pairwise(known) if size <= pair[1][0]),
            (known[-2], known[-1]),
        )
        slope = (high[1] - low[1]) / (high[0] - low[0])
        found[size] = max(known[0][1], low[1] + slope * (size - low[0]))
    return found
