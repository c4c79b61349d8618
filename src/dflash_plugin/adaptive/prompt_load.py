"""Seconds that prompts take between decode steps, and how they depend on what a step commits.

Each request that ends makes room for a prompt. Under a heavy load nearly every decode step is
followed by a pass that reads prompts, however many tokens the step commits, so that a step that
commits more has fewer such passes for the same text.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

# Steps over which the share of those with prompts behind them is averaged.
WINDOW = 64
# Times of prompts that count, the last ones; their median does.
KEPT = 32
# Longer than this the engine idled.
IDLE = 1.0
# Share of steps above which prompts are taken to follow every step.
ALWAYS = 0.98


class PromptLoad:
    """Learns from the time between decode steps what prompts between them take."""

    def __init__(self) -> None:
        self._share = 0.0
        self._seconds: deque[float] = deque(maxlen=KEPT)

    def note(self, seconds: float, prompts: bool) -> None:
        """Learn from two decode steps in a row.

        Args:
            seconds: between them, with prompts beyond what the first one takes.
            prompts: prompts were read between them.
        """
        if seconds > IDLE:
            return
        self._share += (prompts - self._share) / WINDOW
        if prompts:
            self._seconds.append(max(0.0, seconds))

    def behind(self, tokens: float) -> float:
        """Seconds that prompts take behind a step, on average.

        Requests end, and prompts come, in proportion to the tokens that steps commit. One pass
        reads all prompts that wait, so that with Poisson arrivals a pass follows a step with
        probability ``1 - exp(-rate)``.

        Args:
            tokens: that the step commits, as a multiple of what recent steps committed.
        """
        if not self._seconds:
            return 0.0
        rate = -math.log1p(-min(self._share, ALWAYS))
        return median(self._seconds) * (1.0 - math.exp(-rate * tokens))
