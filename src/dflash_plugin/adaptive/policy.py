"""How many rows each request gets in a verify pass: one verify length for a whole step.

The policy weighs two things it learns while serving. The first is how many tokens a pass of each
verify length commits, from the outcomes of passes, or as an engine that shares the rows out by
confidence expects them. The second is how many seconds a step of each verify length takes, by the
clock, and the prompts behind it. Neither looks at a drawn token, so the verify length never depends
on one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from dflash_plugin.adaptive.prompt_load import PromptLoad
from dflash_plugin.errors import DFlashError

# Verify lengths that passes can have, beside the limits.
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Steps of one verify length before another is chosen, so that some of them can be timed.
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
# How many outcomes a position's prior weighs; the prior is the rate of the position before it.
PRIOR = 8.0
# The prior of the first position.
FIRST = 0.7
# Another verify length has to be better by this factor to replace the one in use.
GAIN = 1.01
# Steps between two trials of a verify length other than the best, at first and later: in the end
# trials take 0.4 % of the steps.
FIRST_PROBE, PROBE = 64, 2048


def choose_verify_lens(block: int, min_drafts: int, max_drafts: int | None) -> tuple[int, ...]:
    """Verify lengths that passes can have, rising: the limits, and some of ``ROWS`` between them.

    Args:
        block: rows of a whole block.
        min_drafts: drafts of each request that are always verified.
        max_drafts: drafts of each request that may be verified, None for all.

    Raises:
        DFlashError: the limits leave none.
    """
    drafts = block - 1
    limit = drafts if max_drafts is None else min(max_drafts, drafts)
    if not 0 <= min_drafts <= limit:
        raise DFlashError(
            f"min_draft_tokens is {min_drafts} and max_draft_tokens {limit}, of {drafts} drafts: "
            "give 0 <= min_draft_tokens <= max_draft_tokens"
        )
    between = (rows for rows in ROWS if min_drafts + 1 < rows < limit + 1)
    return tuple(sorted({min_drafts + 1, *between, limit + 1}))


class AcceptanceRates:
    """For each draft position, how often its draft is accepted if those before it are.

    Args:
        drafts: positions of a block, K.
    """

    def __init__(self, drafts: int) -> None:
        self.judged = [0.0] * drafts
        self.accepted = [0.0] * drafts

    def observe(self, verified: int, accepted: Iterable[int]) -> None:
        """Learn from a pass.

        Args:
            verified: drafts of each request that were verified.
            accepted: drafts that were accepted, by request.
        """
        counts = Counter(accepted)
        left = counts.total()
        keep = max(0.0, 1.0 - left / MEMORY)
        for position in range(verified):
            # The first rejected draft was judged, the drafts after it were not.
            self.judged[position] = keep * self.judged[position] + left
            left -= counts[position]
            self.accepted[position] = keep * self.accepted[position] + left

    def expected(self) -> list[float]:
        """Tokens that a request commits in a pass of 1, 2, … rows, [K + 1]."""
        rate, survival, tokens, found = FIRST, 1.0, 1.0, [1.0]
        for judged, accepted in zip(self.judged, self.accepted, strict=True):
            rate = (accepted + PRIOR * rate) / (judged + PRIOR)
            survival *= rate
            tokens += survival
            found.append(tokens)
        return found


def growth(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """Increases of ``VerifyLenPolicy.counts``, of those that rose or are new.

    A count that is lower than before started again from zero, as when an engine sets up its runner
    a second time.
    """
    increases = {}
    for name, count in now.items():
        last = before.get(name)
        if last is None or count < last:
            increases[name] = count
        elif count > last:
            increases[name] = count - last
    return increases


class VerifyLenPolicy:
    """Chooses the verify length of the next step.

    Args:
        verify_lens: verify lengths that passes can have, rising; 1 verifies no draft.
        sizes: numbers of requests that passes are captured for, rising; a number between two costs
            what the larger does.
        latency_vs_throughput: exponent of the step's seconds in ``tokens / seconds ** exponent``.
            1 commits most tokens per second; 0 ignores time and always verifies the maximum.
        expected: returns the tokens that a request commits in a pass of 1, 2, … rows; None learns
            them from outcomes.
        agree: turns this process's choice into the one that all processes of a step share, as their
            clocks differ; None with one process. All processes call it in the same steps, because
            which steps choose depends on the numbers of requests alone.
        block: rows of a whole block, where passes can have more; the longest verify length if None.

    Attributes:
        seconds: of a step, by captured requests and verify length, as far as it has been timed.
        prior: seconds of a pass by captured requests and verify length, as profiled at start
            without the host's work. Empty where every verify length is tried instead.
    """

    def __init__(
        self,
        verify_lens: Sequence[int],
        sizes: Sequence[int] = (),
        latency_vs_throughput: float = 1.0,
        expected: Callable[[], Sequence[float]] | None = None,
        agree: Callable[[int], int] | None = None,
        block: int | None = None,
    ) -> None:
        self.block = block or verify_lens[-1]
        self.verify_lens = tuple(verify_lens)
        self.agree = agree
        self.sizes = tuple(sizes)
        self.weight = latency_vs_throughput
        self.acceptance = AcceptanceRates(max(verify_lens) - 1)
        self.expected = expected or self.acceptance.expected
        self.prior: dict[tuple[int, int], float] = {}
        self.seconds: dict[tuple[int, int], float] = {}
        self.steps = dict.fromkeys(self.verify_lens, 0)
        self.proposed = self.verified = self.saved = self.probed = 0
        self._times: dict[tuple[int, int], deque[float]] = {}
        self._recent: deque[tuple[int, int]] = deque(maxlen=SETTLED)
        self._last: float | None = None
        self._prompts = PromptLoad()
        # When the last step began, if the next one follows it, and whether prompts were read since.
        self._before: float | None = None
        self._prompted = self._probes_now = False
        self._verify_len, self._size, self._left = self.verify_lens[-1], 0, 0
        self._until_probe, self._pause, self._probes = FIRST_PROBE, FIRST_PROBE, 0

    def interrupt(self) -> None:
        """The engine ran something else or idled, so the clock does not time the last step."""
        self._recent.clear()
        self._last = None

    def read_prompts(self) -> None:
        """The engine read prompts since the last step."""
        self.interrupt()
        self._prompted = True

    def leave(self) -> None:
        """The engine ran steps that this policy did not choose."""
        self.interrupt()
        self._before = None

    def choose(self, requests: int, now: float) -> int:
        """Verify length of the step that begins now.

        Args:
            requests: requests of the step.
            now: seconds of a monotonic clock.
        """
        size = self._captured(requests)
        self._time(now)
        self._note_prompts(now)
        if size != self._size:
            self._size, self._left = size, 0
        if self._left == 0:
            verify_len = self._next(size)
            self._verify_len = verify_len if self.agree is None else self.agree(verify_len)
            self._left = RUN
        self._left -= 1
        self._until_probe -= 1
        self.steps[self._verify_len] += 1
        self.probed += self._probes_now
        # A step that verifies no draft does not draft.
        self.proposed += requests * (max(self.block, self._verify_len) - 1) * (self._verify_len > 1)
        self.verified += requests * (self._verify_len - 1)
        self.saved += requests * max(0, self.block - self._verify_len)
        self._recent.append((size, self._verify_len))
        self._last = self._before = now
        return self._verify_len

    def observe(self, verify_len: int, accepted: Iterable[int]) -> None:
        """Learn from a step.

        Args:
            verify_len: rows that each request had.
            accepted: drafts that were accepted, by request.
        """
        self.acceptance.observe(verify_len - 1, accepted)

    def summary(self) -> dict[str, object]:
        """What has been learnt and chosen so far.

        Returns:
            ``steps`` by rows; ``probe_steps``, those of them that tried a verify length;
            ``drafts_proposed``, ``drafts_verified`` and ``drafts_saved`` of all requests; the
            ``expected_tokens`` of a pass by rows; and ``step_milliseconds`` by requests and rows,
            of those that have been timed.
        """
        times: dict[int, dict[int, float]] = {}
        for (size, verify_len), seconds in sorted(self.seconds.items()):
            times.setdefault(size, {})[verify_len] = round(1e3 * seconds, 3)
        return {
            "steps": dict(self.steps),
            "probe_steps": self.probed,
            "drafts_proposed": self.proposed,
            "drafts_verified": self.verified,
            "drafts_saved": self.saved,
            "expected_tokens": [round(tokens, 3) for tokens in self.expected()],
            "step_milliseconds": times,
        }

    def counts(self) -> dict[str, int]:
        """Drafts ``proposed``, ``verified`` and ``saved``, steps that ``probed`` a verify length,
        and steps of 8 rows as ``steps:8``.
        """
        return {
            "probed": self.probed,
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

    def _note_prompts(self, now: float) -> None:
        """Learn what prompts took since the last step, if any were read."""
        prompted, self._prompted = self._prompted, False
        if self._before is None:
            return
        # Only prompts need to know what the step itself took, which takes a search.
        took = self._of_step(self._size, self._verify_len) if prompted else 0.0
        if took is not None:
            self._prompts.note(now - self._before - took, prompted)

    def _next(self, size: int) -> int:
        seconds: dict[int, float] = {}
        self._probes_now = True
        # From the longest down, one whose time is not known at all is tried.
        for verify_len in reversed(self.verify_lens):
            took = self._of_step(size, verify_len)
            if took is None:
                return verify_len
            seconds[verify_len] = took
        expected = self.expected()

        def rate(verify_len: int, took: float) -> float:
            tokens = expected[verify_len - 1]
            took += self._prompts.behind(tokens / expected[self._verify_len - 1])
            found: float = tokens / took**self.weight
            return found

        rates = {
            verify_len: rate(verify_len, seconds[verify_len]) for verify_len in self.verify_lens
        }
        best = max(self.verify_lens, key=rates.__getitem__)
        if rates[best] <= GAIN * rates.get(self._verify_len, 0.0):
            best = self._verify_len
        if self._until_probe > 0 or len(self.verify_lens) == 1:
            self._probes_now = False
            return best
        self._pause = min(2 * self._pause, PROBE)
        self._until_probe, self._probes = self._pause, self._probes + 1
        index = self.verify_lens.index(best)
        if self._probes % 2:
            # The next longer one shows what drafts that are not verified now would gain.
            return self.verify_lens[index + 1 if best < self.verify_lens[-1] else index - 1]
        # The one that would be best if its shortest time were its true one.
        others = [verify_len for verify_len in self.verify_lens if verify_len != best]
        shortest = {w: min(self._times.get((size, w)) or [seconds[w]]) for w in others}
        return max(others, key=lambda verify_len: rate(verify_len, shortest[verify_len]))

    def _of_step(self, size: int, verify_len: int) -> float | None:
        """Seconds of a step; more requests or more rows never take less.

        Whole blocks are not compared with shorter ones, whose batch is compacted first.
        """
        found = [
            seconds
            for (requests, rows), seconds in self.seconds.items()
            if requests >= size and rows >= verify_len and self._alike(rows, verify_len)
        ]
        if (size, verify_len) not in self.seconds:
            guess = self._from_prior(size, verify_len)
            if guess is None:
                return None
            found.append(guess)
        return min(found)

    def _alike(self, rows: int, verify_len: int) -> bool:
        """Whether both are whole blocks, or neither is."""
        return (rows == self.verify_lens[-1]) == (verify_len == self.verify_lens[-1])

    def _from_prior(self, size: int, verify_len: int) -> float | None:
        """The profiled time plus the host's time, by the nearest steps that have been timed.

        An engine may hide the host's work behind passes. The shorter estimate is used, as a verify
        length that is chosen is timed soon. Where prompts come so often that no step is timed, the
        profile is used as it is.
        """
        profiled = self.prior.get((size, verify_len))
        timed = [kind for kind in self.seconds if kind in self.prior]
        timed = [kind for kind in timed if self._alike(kind[1], verify_len)] or timed
        if profiled is None or not timed:
            return profiled
        nearest = min(abs(requests - size) for requests, _ in timed)
        guesses, floor = [], 0.0
        for kind in timed:
            if abs(kind[0] - size) == nearest:
                took, of_pass = self.seconds[kind], self.prior[kind]
                guess = profiled + max(0.0, took - of_pass)
                guesses.append(guess if nearest else min(guess, max(profiled, took)))
                if nearest == 0 and kind[1] < verify_len < self.verify_lens[-1]:
                    floor = max(floor, took)
        return max(floor, float(median(guesses)))
