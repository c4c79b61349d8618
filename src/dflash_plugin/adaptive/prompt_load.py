"""Seconds that prompts take beside decode steps, and how they depend on what a step commits.

Each request that ends makes room for a prompt. Under a heavy load nearly every decode step is
followed by a pass that reads prompts, however many tokens the step commits, so that a step that
commits more has fewer such passes for the same text. That saves what a pass takes whatever it
reads: each prompt's own tokens are read all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

# Steps over which times are averaged. An engine that prepares a pass while another runs sees the
# time of one a step or two later, so that single times tell little.
WINDOW = 64
# Longer than this the engine idled.
IDLE = 1.0
# Share of steps above which prompts are taken to follow every step.
ALWAYS = 0.98
# Chance that another prompt comes in a step, below which none waits for it: mostly in vain.
MIN_CHANCE = 0.2


class PromptLoad:
    """Learns from the time between decode steps what prompts between them take.

    Attributes:
        pass_seconds: of a pass over so many tokens; None where no pass was profiled.
    """

    def __init__(self) -> None:
        self.pass_seconds: Callable[[int], float] | None = None
        # Averages over steps: share of those with prompts, prompts, their tokens, the rows that
        # their passes have besides, and the seconds that prompts take.
        self._share = self._prompts = self._tokens = self._rows = self._seconds = 0.0

    def note(self, seconds: float, prompts: int, tokens: int, rows: int = 0) -> None:
        """Learn from two decode steps in a row.

        Args:
            seconds: between them, beyond what the first one takes; negative if it took less.
            prompts: that were read meanwhile.
            tokens: of these prompts.
            rows: of the pass that read them, beside them; 0 where it reads prompts alone.
        """
        if seconds > IDLE:
            return
        self._share += ((prompts > 0) - self._share) / WINDOW
        self._prompts += (prompts - self._prompts) / WINDOW
        self._tokens += (tokens - self._tokens) / WINDOW
        self._rows += ((rows if prompts else 0) - self._rows) / WINDOW
        self._seconds += (seconds - self._seconds) / WINDOW

    def behind(self, committed: float) -> float:
        """Seconds that prompts take behind a step, on average.

        Requests end, and prompts come, in proportion to the tokens that steps commit. One pass
        reads all prompts that wait, so that with Poisson arrivals a pass follows a step with
        probability ``1 - exp(-rate)``.

        Args:
            committed: tokens that the step commits, as a multiple of what recent steps committed.
        """
        of_pass, of_tokens = self.seconds_of_pass()
        rate = -math.log1p(-min(self._share, ALWAYS))
        passes = 1.0 - math.exp(-rate * committed)
        return of_pass * passes + of_tokens * self._share * committed

    def worth_waiting(self, step: float, requests: int) -> int:
        """Waiting prompts that had better wait for one more to come, if there are fewer than this.

        The requests that they wait for to begin miss a step; where another prompt comes meanwhile,
        one pass reads both.

        Args:
            step: seconds of a decode step.
            requests: that decode.
        """
        of_pass, _ = self.seconds_of_pass()
        chance = 1.0 - math.exp(-self._prompts)
        return math.ceil(chance * of_pass * requests / step) if chance >= MIN_CHANCE else 0

    def seconds_of_pass(self) -> tuple[float, float]:
        """Seconds of a pass that reads prompts, whatever it reads, and of its tokens."""
        if self._share == 0 or self._seconds <= 0:
            return 0.0, 0.0
        whole = self._seconds / self._share
        longer = self._longer(self._tokens / self._share, round(self._rows / self._share))
        of_tokens = min(whole, longer)
        return whole - of_tokens, of_tokens

    def _longer(self, tokens: float, rows: int) -> float:
        """Seconds by which a pass takes longer for so many tokens than for its other rows alone."""
        if self.pass_seconds is None or tokens < 1:
            return 0.0
        alone = self.pass_seconds(max(1, rows))
        return max(0.0, self.pass_seconds(math.ceil(tokens) + rows) - alone)
