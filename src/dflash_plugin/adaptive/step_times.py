"""Seconds of steps: what the clock says, and what a profile says where it says nothing yet."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

# Steps in a row of one kind before the time between two of them is that kind's: an engine that
# prepares a step while the last one runs is one step ahead of the clock.
SETTLED = 3
# Times of a kind before it is known.
TIMES = 3
# Times of a kind that count, the last ones; their median does.
KEPT = 32


class Lengths(NamedTuple):
    """What a step runs for each request.

    Attributes:
        verify: rows that are verified, on average; 1 verifies no draft.
        draft: rows of the block that is drafted, the anchor included.
    """

    verify: int
    draft: int


class Step(NamedTuple):
    """What the seconds of a step depend on.

    Attributes:
        size: requests of the captured pass.
        verify, draft: as of ``Lengths``.
    """

    size: int
    verify: int
    draft: int


class StepTimes:
    """Seconds of steps, as far as they are known.

    Args:
        whole: lengths of a step that verifies whole blocks. It is not compared with shorter ones,
            whose batch is compacted first.

    Attributes:
        whole: as given.
        prior: seconds of the passes of a step, as profiled at start without the host's work. Empty
            where everything is tried instead.
        seconds: of a step, as far as it has been timed.
    """

    def __init__(self, whole: Lengths) -> None:
        self.prior: dict[Step, float] = {}
        self.seconds: dict[Step, float] = {}
        self.whole = whole
        self._times: dict[Step, deque[float]] = {}
        self._recent: deque[Step] = deque(maxlen=SETTLED)
        self._last: float | None = None

    def interrupt(self) -> None:
        """Something else ran or the engine idled, so the clock does not time the last step."""
        self._recent.clear()
        self._last = None

    def end(self, now: float) -> None:
        """The last step has ended; its time is taken, where the clock shows it."""
        recent = self._recent
        if self._last is None or len(recent) < SETTLED or len(set(recent)) > 1:
            return
        kind, seconds = recent[-1], now - self._last
        if seconds <= 0 or not math.isfinite(seconds):
            return
        times = self._times.setdefault(kind, deque(maxlen=KEPT))
        times.append(seconds)
        if len(times) >= TIMES:
            self.seconds[kind] = median(times)

    def begin(self, step: Step, now: float) -> None:
        """A step begins."""
        self._recent.append(step)
        self._last = now

    def shortest(self, step: Step) -> float | None:
        """The shortest of a step's last times; None where it has none."""
        return min(self._times.get(step, ()), default=None)

    def of(self, size: int) -> Estimates:
        """What is known of steps of ``size`` requests."""
        least: dict[Lengths, float] = {}
        for other, seconds in self.seconds.items():
            if other.size >= size:
                lengths = Lengths(*other[1:])
                least[lengths] = min(seconds, least.get(lengths, seconds))
        profiled, nearest = [other for other in self.seconds if other in self.prior], {}
        for whole in (False, True):
            alike = [one for one in profiled if (one[1:] == self.whole) == whole] or profiled
            distance = min((abs(other.size - size) for other in alike), default=0)
            nearest[whole] = [other for other in alike if abs(other.size - size) == distance]
        return Estimates(self, size, least, nearest)


class Estimates(NamedTuple):
    """Seconds of steps of one number of requests.

    Attributes:
        times: of all steps.
        size: requests.
        least: seconds of the shortest step of as many requests or more.
        nearest: those that were profiled too, of the nearest number of requests; for whole blocks,
            and for others. Each stands in for the other where it is empty.
    """

    times: StepTimes
    size: int
    least: Mapping[Lengths, float]
    nearest: Mapping[bool, Sequence[Step]]

    def seconds(self, lengths: Lengths) -> float | None:
        """Seconds of a step; more requests or more rows never take less. None if unknown."""
        is_whole = lengths == self.times.whole
        found = [
            seconds
            for other, seconds in self.least.items()
            if other.verify >= lengths.verify
            and other.draft >= lengths.draft
            and (other == self.times.whole) == is_whole
        ]
        if Step(self.size, *lengths) not in self.times.seconds:
            guess = self._from_prior(lengths)
            if guess is None:
                return None
            found.append(guess)
        return min(found)

    def _from_prior(self, lengths: Lengths) -> float | None:
        """The profiled time plus the host's time, by the nearest steps that have been timed.

        An engine may hide the host's work behind passes. Two timed steps of as many requests tell
        how much longer a step takes for a longer pass. Before, the shorter estimate is used, as
        lengths that are chosen are timed soon. Where prompts come so often that no step is timed,
        the profile is used as it is.

        A step that takes less time than its passes took when they were profiled shows that
        something else ran meanwhile; the other profiled times are taken to be as much too long.
        """
        whole = lengths == self.times.whole
        profiled, timed = self.times.prior.get(Step(self.size, *lengths)), self.nearest[whole]
        if profiled is None or not timed:
            return profiled
        as_many = timed[0].size == self.size
        shares = [self.times.seconds[other] / self.times.prior[other] for other in timed]
        share = min(1.0, median(shares))
        profiled *= share
        guesses, floor = [], 0.0
        for other in timed:
            took, of_pass = self.times.seconds[other], share * self.times.prior[other]
            guess = profiled + max(0.0, took - of_pass)
            guesses.append(min(guess, max(profiled, took)) if as_many else guess)
            shorter = other.verify < lengths.verify and other.draft <= lengths.draft
            if as_many and shorter and not whole:
                floor = max(floor, took)
        if as_many and not whole:
            prior = {other: share * self.times.prior[other] for other in timed}
            guesses = self._on_line(profiled, prior) or guesses
        return max(floor, float(median(guesses)))

    def _on_line(self, profiled: float, prior: Mapping[Step, float]) -> list[float]:
        """Seconds of a step by those of the two whose passes take most nearly as long, if any.

        Args:
            profiled: seconds of the step's passes.
            prior: seconds of the passes of steps that have been timed.
        """
        seconds = self.times.seconds
        near = sorted(prior, key=lambda other: abs(prior[other] - profiled))
        first = near[0]
        second = next((other for other in near if prior[other] != prior[first]), None)
        if second is None:
            return []
        slope = (seconds[first] - seconds[second]) / (prior[first] - prior[second])
        more = profiled - prior[first]
        return [max(profiled, seconds[first] + min(1.0, max(0.0, slope)) * more)]
