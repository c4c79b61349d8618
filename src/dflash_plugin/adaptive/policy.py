"""How many rows a request gets in a verify pass, one number for a whole step, learnt while serving.

The parts are the tokens that a pass of each width commits, from the outcomes of passes or as an
engine that shares the rows out by confidence expects them, and the seconds of a step of each width,
from the clock. Neither looks at a drawn token, so that the number never depends on one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from dflash_plugin.errors import DFlashError

# Rows that passes can have, beside the limits.
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Steps of one width before another is chosen, so that some of them can be timed.
RUN = 8
# Steps in a row of one kind before the time between two of them is that kind's: an engine that
# prepares a step while the last one runs is one step ahead of the clock.
SETTLED = 3
# Times of a kind before it is known.
TIMES = 3
# Times of a kind that count, the last ones; their median does.
KEPT = 32
# Passes of requests whose outcomes count; older ones fade.
MEMORY = 20000.0
# What a position's first belief, the one before it, is worth in outcomes.
PRIOR = 8.0
FIRST = 0.7
# A width has to promise so much more than the one in use.
GAIN = 1.01
# Steps between two looks at another width than the best, at first and later.
FIRST_PROBE, PROBE = 64, 512


def choose_widths(block: int, least: int, most: int | None) -> tuple[int, ...]:
    """Rows that passes can have, rising: the limits, and some of ``ROWS`` between them.

    Args:
        block: rows of a whole block.
        least: drafts that are verified at least.
        most: drafts that are verified at most, None for all.

    Raises:
        DFlashError: the limits leave none.
    """
    drafts = block - 1
    most = drafts if most is None else min(most, drafts)
    if not 0 <= least <= most:
        raise DFlashError(
            f"min_draft_tokens is {least} and max_draft_tokens {most}, of {drafts} drafts: give "
            "0 <= min_draft_tokens <= max_draft_tokens"
        )
    between = (rows for rows in ROWS if least + 1 < rows < most + 1)
    return tuple(sorted({least + 1, *between, most + 1}))


class Acceptance:
    """The chance of each draft to stand if those before it do.

    Args:
        drafts: of a block.
    """

    def __init__(self, drafts: int) -> None:
        self.judged = [0.0] * drafts
        self.stood = [0.0] * drafts

    def observe(self, verified: int, accepted: Iterable[int]) -> None:
        """Learn from a pass.

        Args:
            verified: drafts of each request.
            accepted: of those, by request.
        """
        counts = Counter(accepted)
        left = counts.total()
        keep = max(0.0, 1.0 - left / MEMORY)
        for place in range(verified):
            # The first that fell was judged, those behind it were not.
            self.judged[place] = keep * self.judged[place] + left
            left -= counts[place]
            self.stood[place] = keep * self.stood[place] + left

    def expected(self) -> list[float]:
        """Tokens that a request commits in a pass of 1, 2, … rows."""
        chance, survival, tokens, found = FIRST, 1.0, 1.0, [1.0]
        for judged, stood in zip(self.judged, self.stood, strict=True):
            chance = (stood + PRIOR * chance) / (judged + PRIOR)
            survival *= chance
            tokens += survival
            found.append(tokens)
        return found


def growth(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """By how much ``VerifyLenPolicy.counts`` have grown, of those that have and those that are new.

    One that is less than before began anew, as with an engine that sets up its runner again.
    """
    grown = {}
    for name, count in now.items():
        last = before.get(name)
        if last is None or count < last:
            grown[name] = count
        elif count > last:
            grown[name] = count - last
    return grown


class VerifyLenPolicy:
    """Chooses the rows of the next verify pass.

    Args:
        widths: rows that passes can have, rising; 1 verifies no draft.
        sizes: requests that passes are captured for, rising; others cost what the next larger does.
        latency_vs_throughput: 1 commits most tokens a second; less weighs a step's seconds less, 0
            not at all, so that each step verifies as much as it may.
        expected: tokens that a request commits in a pass of 1, 2, … rows; None learns them from
            outcomes.
        agree: gives the one choice of all processes that run a step together, whose clocks differ,
            for this one's; None where there is one process. Which steps choose depends on nothing
            but the numbers of requests, so that all processes ask in the same steps.

    Attributes:
        seconds: of a step, by captured requests and rows, as far as it has been timed.
        prior: seconds by captured requests and rows, as profiled at start, without the host's
            work. Empty where every width is tried instead.
    """

    def __init__(
        self,
        widths: Sequence[int],
        sizes: Sequence[int] = (),
        latency_vs_throughput: float = 1.0,
        expected: Callable[[], Sequence[float]] | None = None,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self.widths = tuple(widths)
        self.agree = agree
        self.sizes = tuple(sizes)
        self.weight = latency_vs_throughput
        self.acceptance = Acceptance(max(widths) - 1)
        self.expected = expected or self.acceptance.expected
        self.prior: dict[tuple[int, int], float] = {}
        self.seconds: dict[tuple[int, int], float] = {}
        self.steps = dict.fromkeys(self.widths, 0)
        self.proposed = self.verified = self.saved = 0
        self._times: dict[tuple[int, int], deque[float]] = {}
        self._recent: deque[tuple[int, int]] = deque(maxlen=SETTLED)
        self._last: float | None = None
        self._width, self._size, self._left = self.widths[-1], 0, 0
        self._until_probe, self._pause, self._probes = FIRST_PROBE, FIRST_PROBE, 0

    def interrupt(self) -> None:
        """Something else ran, or nothing: the clock says nothing of the last step."""
        self._recent.clear()
        self._last = None

    def choose(self, requests: int, now: float) -> int:
        """Rows of each request in the step that begins now.

        Args:
            requests: of the step.
            now: seconds of a clock that only rises.
        """
        size = self._captured(requests)
        self._time(now)
        if size != self._size:
            self._size, self._left = size, 0
        if self._left == 0:
            width = self._next(size)
            self._width = width if self.agree is None else self.agree(width)
            self._left = RUN
        self._left -= 1
        self._until_probe -= 1
        self.steps[self._width] += 1
        # A pass that verifies none does not draft.
        self.proposed += requests * (self.widths[-1] - 1) * (self._width > 1)
        self.verified += requests * (self._width - 1)
        self.saved += requests * (self.widths[-1] - self._width)
        self._recent.append((size, self._width))
        self._last = now
        return self._width

    def observe(self, width: int, accepted: Iterable[int]) -> None:
        """Learn what came of a step's drafts; arguments as ``Acceptance``'s, with rows."""
        self.acceptance.observe(width - 1, accepted)

    def summary(self) -> dict[str, object]:
        """What has been learnt and chosen so far.

        Returns:
            ``steps`` by rows; ``drafts_proposed``, ``drafts_verified`` and ``drafts_saved`` of all
            requests; the ``expected_tokens`` of a pass by rows; and ``step_milliseconds`` by
            requests and rows, of those that have been timed.
        """
        times: dict[int, dict[int, float]] = {}
        for (size, width), seconds in sorted(self.seconds.items()):
            times.setdefault(size, {})[width] = round(1e3 * seconds, 3)
        return {
            "steps": dict(self.steps),
            "drafts_proposed": self.proposed,
            "drafts_verified": self.verified,
            "drafts_saved": self.saved,
            "expected_tokens": [round(tokens, 3) for tokens in self.expected()],
            "step_milliseconds": times,
        }

    def counts(self) -> dict[str, int]:
        """Drafts ``proposed``, ``verified`` and ``saved``, and steps of 8 rows as ``steps:8``."""
        return {
            "proposed": self.proposed,
            "verified": self.verified,
            "saved": self.saved,
            **{f"steps:{rows}": steps for rows, steps in self.steps.items()},
        }

    def _captured(self, requests: int) -> int:
        index = bisect_left(self.sizes, requests)
        return self.sizes[index] if index < len(self.sizes) else requests

    def _time(self, now: float) -> None:
        """Take the time since the last step, where it is that step's."""
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

    def _next(self, size: int) -> int:
        seconds: dict[int, float] = {}
        # From the widest down, one that is not known at all is tried.
        for width in reversed(self.widths):
            took = self._of_step(size, width)
            if took is None:
                return width
            seconds[width] = took
        expected = self.expected()

        def rate(width: int, took: float) -> float:
            tokens: float = expected[width - 1] / took**self.weight
            return tokens

        rates = {width: rate(width, seconds[width]) for width in self.widths}
        best = max(self.widths, key=rates.__getitem__)
        if rates[best] <= GAIN * rates.get(self._width, 0.0):
            best = self._width
        if self._until_probe > 0 or len(self.widths) == 1:
            return best
        self._pause = min(2 * self._pause, PROBE)
        self._until_probe, self._probes = self._pause, self._probes + 1
        index = self.widths.index(best)
        if self._probes % 2:
            # The next wider one tells of drafts that are not verified.
            return self.widths[index + 1 if best < self.widths[-1] else index - 1]
        # That which is best if its shortest time is right.
        others = [width for width in self.widths if width != best]
        shortest = {w: min(self._times.get((size, w)) or [seconds[w]]) for w in others}
        return max(others, key=lambda width: rate(width, shortest[width]))

    def _of_step(self, size: int, width: int) -> float | None:
        """Seconds of a step; more requests or more rows never take less.

        Whole blocks are not compared with others, which have to be cut first.
        """
        found = [
            seconds
            for (requests, rows), seconds in self.seconds.items()
            if requests >= size and rows >= width and self._alike(rows, width)
        ]
        if (size, width) not in self.seconds:
            guess = self._from_prior(size, width)
            if guess is None:
                return None
            found.append(guess)
        return min(found)

    def _alike(self, rows: int, width: int) -> bool:
        """Whether neither of both widths is that of whole blocks, or both are."""
        return (rows == self.widths[-1]) == (width == self.widths[-1])

    def _from_prior(self, size: int, width: int) -> float | None:
        """The profiled time and what it leaves out, by the nearest steps that have been timed.

        An engine hides what it leaves out behind passes, or does not. Of both, what promises more
        is believed of other widths, since it will be timed if it is chosen. Where prompts come so
        often that no step is timed, the profile has to do.
        """
        profiled = self.prior.get((size, width))
        timed = [kind for kind in self.seconds if kind in self.prior]
        timed = [kind for kind in timed if self._alike(kind[1], width)] or timed
        if profiled is None or not timed:
            return profiled
        nearest = min(abs(requests - size) for requests, _ in timed)
        guesses, least = [], 0.0
        for kind in timed:
            if abs(kind[0] - size) == nearest:
                took, of_pass = self.seconds[kind], self.prior[kind]
                guess = profiled + max(0.0, took - of_pass)
                guesses.append(guess if nearest else min(guess, max(profiled, took)))
                if nearest == 0 and kind[1] < width < self.widths[-1]:
                    least = max(least, took)
        return max(least, float(median(guesses)))
