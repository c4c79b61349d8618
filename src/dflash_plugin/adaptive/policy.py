"""How many rows each request gets in a verify pass: one verify length for a whole step.

The policy weighs two things it learns while serving. The first is how many tokens a pass of each
verify length commits, from the outcomes of passes, or as an engine that shares the rows out by
confidence expects them. The second is how many seconds a step of each verify length takes, by the
clock, and the prompts behind it. Neither looks at a drawn token, so the verify length never depends
on one.

Where the engine can draft blocks of fewer rows, the policy also chooses the draft length: many
requests verify few drafts each, and a shorter block saves what the others take to draft.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

from dflash_plugin.adaptive.acceptance_rates import AcceptanceRates
from dflash_plugin.adaptive.prompt_load import PromptLoad
from dflash_plugin.adaptive.step_times import Estimates, Lengths, Step, StepTimes
from dflash_plugin.errors import DFlashError

# Verify lengths that passes can have, beside the limits.
ROWS = (1, 2, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
# Steps of one verify length before another is chosen, so that some of them can be timed.
RUN = 8
# Another verify length has to be better by this factor to replace the one in use.
GAIN = 1.01
# Steps between two trials of a verify length other than the best, at first and later: in the end
# trials take 0.4 % of the steps.
FIRST_PROBE, PROBE = 64, 2048
# Steps that a prompt waits for another to come, at most. A step of many requests takes 10 to 30 ms.
MOST_WAITED = 3


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
        agree: turns this process's choice, a number, into the one that all processes of a step
            share, as their clocks differ; None with one process. All processes call it in the same
            steps, because which steps choose depends on the numbers of requests alone.
        block: rows of a whole block, where passes can have other maxima; the longest verify length
            if None.

    Attributes:
        choices: what a step can run.
        draft_len: rows of a block that the chosen step drafts, the anchor included.
        times: seconds of steps.
        prompts: what prompts between steps take.
        may_wait: the engine lets prompts wait for others where that saves time.
        wait_below: prompts that had better wait for another to come, if there are fewer.
        waited: decode steps for which prompts have waited so.
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
        self._expected_of_short = self.expected
        self.choices = [Lengths(verify, self.block) for verify in self.verify_lens]
        self.times = StepTimes(self.choices[-1])
        self.steps = dict.fromkeys(self.verify_lens, 0)
        self.proposed = self.verified = self.saved = self.probed = self.shortened = 0
        self.prompts = PromptLoad()
        self.may_wait, self.wait_below, self.waited = False, 0, 0
        # Steps for which the prompts that wait now have waited.
        self._wait_steps = 0
        # When the last step began, if the next one follows it, and since then the prompts, their
        # tokens and the other rows of their pass.
        self._before: float | None = None
        self._read_prompts = self._read_tokens = self._read_rows = 0
        # Seconds of the chosen step, as far as they are known.
        self._took: float | None = None
        self._probes_now = False
        self._chosen, self._size, self._left = self.choices[-1], 0, 0
        self._until_probe, self._pause, self._probes = FIRST_PROBE, FIRST_PROBE, 0

    @property
    def draft_len(self) -> int:
        """Rows of a block that the chosen step drafts, the anchor included."""
        return self._chosen.draft

    def add_short_blocks(
        self, rows: int, expected: Callable[[], Sequence[float]] | None = None
    ) -> None:
        """Let steps that verify few drafts draft blocks of fewer rows.

        Args:
            rows: of such a block, the anchor included; fewer than of a whole block.
            expected: as the policy's, of such blocks; None takes the policy's.
        """
        fitting = [verify for verify in self.verify_lens if 1 < verify <= rows]
        self.choices += [Lengths(verify, rows) for verify in fitting]
        self._expected_of_short = expected or self.expected

    def interrupt(self) -> None:
        """The engine ran something else or idled, so the clock does not time the last step."""
        self.times.interrupt()

    def read_prompts(self, prompts: int, tokens: int, rows: int = 0) -> None:
        """The engine read prompts since the last step, or in its pass.

        Args:
            prompts: how many, or parts of them.
            tokens: of all of them.
            rows: of the pass, beside them; 0 where it reads prompts alone.
        """
        self.interrupt()
        self._read_prompts += prompts
        self._read_tokens += tokens
        self._read_rows += rows

    def let_wait(self, waiting: int, free: int) -> bool:
        """Whether the prompts that wait do so for one more step; asked once before each step.

        Args:
            waiting: prompts that could be read.
            free: requests that have room beside those that run.
        """
        waits = waiting < min(self.wait_below, free) and self._wait_steps < MOST_WAITED
        self._wait_steps = self._wait_steps + 1 if waits else 0
        self.waited += waits
        return waits

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
        self.times.end(now)
        self._note_prompts(now)
        if size != self._size:
            self._size, self._left = size, 0
        if self._left == 0:
            known = self.times.of(size)
            chosen = self._next(known)
            if self.agree is not None:
                chosen = self.choices[self.agree(self.choices.index(chosen))]
            self._chosen, self._left = chosen, RUN
            self._took = known.seconds(chosen)
            if self.may_wait:
                self._choose_wait(requests)
        self._left -= 1
        self._until_probe -= 1
        verify, draft = self._chosen
        self.steps[verify] += 1
        self.probed += self._probes_now
        self.shortened += draft < self.block
        # A step that verifies no draft does not draft.
        self.proposed += requests * (max(draft, verify) - 1) * (verify > 1)
        self.verified += requests * (verify - 1)
        self.saved += requests * max(0, draft - verify)
        self.times.begin(Step(size, verify, draft), now)
        self._before = now
        return verify

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
            ``steps`` by rows; ``probe_steps``, those of them that tried other lengths;
            ``prompt_wait_steps``, those for which prompts waited for others;
            ``drafts_proposed``, ``drafts_verified`` and ``drafts_saved`` of all requests; the
            ``expected_tokens`` of a pass by rows; and ``step_milliseconds`` by requests and rows,
            of those that have been timed. Where blocks may be shorter: ``short_block_steps``, those
            that drafted such blocks, and ``expected_tokens_short`` and ``step_milliseconds_short``.
        """
        times: dict[bool, dict[int, dict[int, float]]] = {False: {}, True: {}}
        for (size, verify, draft), seconds in sorted(self.times.seconds.items()):
            of_size = times[draft < self.block].setdefault(size, {})
            of_size[verify] = round(1e3 * seconds, 3)
        short: dict[str, object] = {}
        if len(self.choices) > len(self.verify_lens):
            tokens = self._expected_of_short()
            short = {
                "short_block_steps": self.shortened,
                "expected_tokens_short": [round(found, 3) for found in tokens],
                "step_milliseconds_short": times[True],
            }
        return {
            "steps": dict(self.steps),
            "probe_steps": self.probed,
            "prompt_wait_steps": self.waited,
            "drafts_proposed": self.proposed,
            "drafts_verified": self.verified,
            "drafts_saved": self.saved,
            "expected_tokens": [round(tokens, 3) for tokens in self.expected()],
            "step_milliseconds": times[False],
            **short,
        }

    def counts(self) -> dict[str, int]:
        """Drafts ``proposed``, ``verified`` and ``saved``, steps that ``probed`` other lengths,
        ``shortened`` blocks or for which prompts ``waited``, and steps of 8 rows as ``steps:8``.
        """
        return {
            "probed": self.probed,
            "shortened": self.shortened,
            "waited": self.waited,
            "proposed": self.proposed,
            "verified": self.verified,
            "saved": self.saved,
            **{f"steps:{rows}": steps for rows, steps in self.steps.items()},
        }

    def _choose_wait(self, requests: int) -> None:
        step, wait = self._took, 0
        if step:
            wait = self.prompts.worth_waiting(step / self.weight, requests) if self.weight else 0
        self.wait_below = wait if self.agree is None else self.agree(wait)

    def _captured(self, requests: int) -> int:
        index = bisect_left(self.sizes, requests)
        return self.sizes[index] if index < len(self.sizes) else requests

    def _note_prompts(self, now: float) -> None:
        """Learn what passed since the last step beyond what it takes, prompts or not."""
        read = self._read_prompts, self._read_tokens, self._read_rows
        self._read_prompts = self._read_tokens = self._read_rows = 0
        if self._before is not None and self._took is not None:
            self.prompts.note(now - self._before - self._took, *read)

    def _next(self, known: Estimates) -> Lengths:
        seconds: dict[Lengths, float] = {}
        self._probes_now = True
        # From the longest down, one whose time is not known at all is tried.
        for choice in sorted(self.choices, reverse=True):
            took = known.seconds(choice)
            if took is None:
                return choice
            seconds[choice] = took
        of_whole, of_short = self.expected(), self._expected_of_short()
        tokens = {
            choice: (of_whole if choice.draft == self.block else of_short)[choice.verify - 1]
            for choice in self.choices
        }

        def rate(choice: Lengths, took: float) -> float:
            took += self.prompts.behind(tokens[choice] / tokens[self._chosen])
            found: float = tokens[choice] / took**self.weight
            return found

        rates = {choice: rate(choice, seconds[choice]) for choice in self.choices}
        best = max(self.choices, key=rates.__getitem__)
        if rates[best] <= GAIN * rates[self._chosen]:
            best = self._chosen
        if self._until_probe > 0 or len(self.choices) == 1:
            self._probes_now = False
            return best
        self._pause = min(2 * self._pause, PROBE)
        self._until_probe, self._probes = self._pause, self._probes + 1
        if self._probes % 2:
            # The next longer one shows what drafts that are not verified now would gain.
            index = self.verify_lens.index(best.verify)
            longer = index + 1 if best.verify < self.verify_lens[-1] else index - 1
            return Lengths(self.verify_lens[longer], self.block)
        # The one that would be best if its shortest time were its true one.
        others = [choice for choice in self.choices if choice != best]
        shortest = {
            choice: self.times.shortest(Step(known.size, *choice)) or seconds[choice]
            for choice in others
        }
        return max(others, key=lambda choice: rate(choice, shortest[choice]))
