"""One number of drafts a step, chosen by outcomes and the clock."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dflash_plugin.adaptive.policy import VerifyLenPolicy, choose_verify_lens, growth
from dflash_plugin.adaptive.prompt_load import WINDOW, PromptLoad
from dflash_plugin.adaptive.step_times import Lengths, Step, StepTimes
from dflash_plugin.errors import DFlashError

WIDTHS = choose_verify_lens(16, 0, None)


class Machine:
    """Requests whose drafts stand with some chance, on a clock that only steps move.

    Args:
        chance: of a draft to stand if those before it do.
        fixed: seconds of a step.
        row: seconds of each row beyond what a step takes anyway.
        free: rows that cost nothing.
        lag: steps that the engine is ahead of the clock.
        noise: share by which steps differ; one of twenty takes five times as long.
    """

    def __init__(
        self,
        chance: float,
        fixed: float = 0.007,
        row: float = 3e-5,
        free: int = 64,
        lag: int = 1,
        noise: float = 0.0,
    ) -> None:
        self.noise = noise
        self.chance, self.fixed, self.row, self.free, self.lag = chance, fixed, row, free, lag
        self.random, self.now, self.tokens = random.Random(0), 0.0, 0
        self.pending: list[float] = []

    def seconds(self, requests: int, width: int) -> float:
        draft = 0.001 if width > 1 else 0.0
        return self.fixed + draft + self.row * max(0, requests * width - self.free)

    def rate(self, requests: int, width: int) -> float:
        stands = sum(self.chance**k for k in range(width))
        return requests * stands / self.seconds(requests, width)

    def step(self, policy: VerifyLenPolicy, requests: int) -> int:
        width = policy.choose(requests, self.now)
        accepted = []
        for _ in range(requests):
            count = 0
            while count < width - 1 and self.random.random() < self.chance:
                count += 1
            accepted.append(count)
        policy.observe(width, accepted)
        self.tokens += requests + sum(accepted)
        seconds = self.seconds(requests, width)
        if self.noise:
            seconds *= self.random.uniform(1 - self.noise, 1 + self.noise)
            seconds *= 5 if self.random.random() < 0.05 else 1
        self.pending.append(seconds)
        if len(self.pending) > self.lag:
            self.now += self.pending.pop(0)
        return width

    def run_prompts(self, seconds: float) -> None:
        self.pending.append(seconds)
        if len(self.pending) > self.lag:
            self.now += self.pending.pop(0)

    def run(self, policy: VerifyLenPolicy, requests: int, steps: int) -> list[int]:
        return [self.step(policy, requests) for _ in range(steps)]


def test_widths_begin_with_the_anchor_alone_and_end_with_the_block():
    assert WIDTHS[0] == 1
    assert WIDTHS[-1] == 16
    assert list(WIDTHS) == sorted(set(WIDTHS))
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(WIDTHS))
    assert choose_verify_lens(16, 3, 7)[0] == 4
    assert choose_verify_lens(16, 3, 7)[-1] == 8
    assert choose_verify_lens(8, 0, 40)[-1] == 8
    assert choose_verify_lens(2, 1, None) == (2,)


@pytest.mark.parametrize(("least", "most"), [(5, 4), (-1, 3), (16, None)])
def test_limits_that_leave_nothing_are_named(least, most):
    with pytest.raises(DFlashError, match=f"min_draft_tokens is {least}"):
        choose_verify_lens(16, least, most)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("chance", [0.3, 0.6, 0.85, 0.97])
@pytest.mark.parametrize("requests", [1, 8, 64, 256])
def test_the_best_width_is_found_and_kept(requests, chance, lag):
    machine = Machine(chance, lag=lag)
    policy = VerifyLenPolicy(WIDTHS)
    machine.run(policy, requests, 600)
    rates = {width: machine.rate(requests, width) for width in WIDTHS}
    widths = machine.run(policy, requests, 2000)
    mean = sum(rates[width] for width in widths) / len(widths)
    assert mean > 0.95 * max(rates.values())


@pytest.mark.parametrize("requests", [1, 8, 64, 256])
@pytest.mark.parametrize("row", [0.0, 3e-5, 3e-4])
def test_times_that_scatter_mislead_little(requests, row):
    machine = Machine(0.7, row=row, free=0, noise=0.4)
    policy = VerifyLenPolicy(WIDTHS)
    machine.run(policy, requests, 600)
    rates = {width: machine.rate(requests, width) for width in WIDTHS}
    widths = machine.run(policy, requests, 4000)
    mean = sum(rates[width] for width in widths) / len(widths)
    assert mean > 0.95 * max(rates.values())


def test_a_time_that_was_wrong_is_found_out():
    """The first times of the best width are five times too long."""
    machine = Machine(0.9)
    policy = VerifyLenPolicy(WIDTHS)
    right = machine.seconds
    machine.seconds = lambda requests, width: right(requests, width) * (5 if width == 16 else 1)
    while Step(8, 16, 16) not in policy.times.seconds:
        machine.step(policy, 8)
    machine.seconds = right
    machine.run(policy, 8, 1500)
    assert machine.run(policy, 8, 500).count(16) > 400


@pytest.mark.parametrize("overhead", [0.0, 0.004])
def test_a_profile_spares_trying(overhead):
    machine = Machine(0.7, fixed=0.002, row=1e-4, free=0)
    policy = VerifyLenPolicy(WIDTHS)
    policy.times.prior = {
        Step(size, width, 16): machine.seconds(size, width) for size in (32, 64) for width in WIDTHS
    }
    machine.fixed += overhead
    for requests in (64, 32):
        rates = {width: machine.rate(requests, width) for width in WIDTHS}
        tried = machine.run(policy, requests, 64)[8:]
        mean = sum(rates[width] for width in tried) / len(tried)
        assert mean > 0.98 * max(rates.values())
        assert len(set(tried)) <= 2


def test_a_profile_does_where_no_step_can_be_timed():
    machine = Machine(0.5, fixed=0.002, row=1e-4, free=0)
    policy = VerifyLenPolicy(WIDTHS)
    policy.times.prior = {Step(64, width, 16): machine.seconds(64, width) for width in WIDTHS}
    for _ in range(200):
        machine.step(policy, 64)
        policy.interrupt()
    assert not policy.times.seconds
    best = max(WIDTHS, key=lambda width: machine.rate(64, width))
    assert [machine.step(policy, 64) for _ in range(20)].count(best) >= 12


def test_a_profile_that_misleads_is_corrected():
    """The host takes as long whatever the width, which no pass by itself shows."""
    machine = Machine(0.9, fixed=0.002, row=1e-4, free=0)
    policy = VerifyLenPolicy(WIDTHS)
    policy.times.prior = {Step(8, width, 16): machine.seconds(8, width) for width in WIDTHS}
    machine.seconds = lambda requests, width: 0.03
    machine.run(policy, 8, 300)
    assert machine.run(policy, 8, 400).count(16) > 300


def test_a_step_that_is_shorter_than_its_profile_corrects_the_others():
    """Something else ran while passes were profiled, so that they seemed to take 2.5 times as long.

    Of three sizes of batches, one step of 16 requests has been timed.
    """
    times = StepTimes(Lengths(16, 16))
    truth = {
        Step(size, verify, 16): 0.004 + 1e-5 * size * verify
        for size in (8, 16, 32)
        for verify in WIDTHS
    }
    times.prior = {step: 2.5 * seconds for step, seconds in truth.items()}
    times.seconds = {Step(16, 4, 16): truth[16, 4, 16]}
    for size, verify, draft in truth:
        found = times.of(size).seconds(Lengths(verify, draft))
        assert found == pytest.approx(truth[size, verify, draft])


def test_rows_that_the_host_hides_are_found_at_once():
    """By their passes fewer rows would pay, but the host takes longer than any of them."""
    machine = Machine(0.8, fixed=0.001, row=4e-5, free=0)
    policy = VerifyLenPolicy(WIDTHS)
    policy.times.prior = {Step(8, width, 16): machine.seconds(8, width) for width in WIDTHS}
    assert machine.step(policy, 8) < 16
    passes = machine.seconds
    machine.seconds = lambda requests, width: max(0.008, passes(requests, width))
    assert machine.run(policy, 8, 48)[16:].count(16) == 32


def test_whole_blocks_need_no_cutting():
    """What cutting takes is learnt at one number of requests and known at others."""
    machine = Machine(0.6, fixed=0.001, row=2e-6, free=0)
    policy = VerifyLenPolicy(WIDTHS)
    policy.times.prior = {
        Step(size, width, 16): machine.seconds(size, width)
        for size in (8, 16, 32)
        for width in WIDTHS
    }
    passes = machine.seconds
    machine.seconds = lambda requests, width: passes(requests, width) + 5e-4 * (width < 16)
    machine.run(policy, 8, 600)
    for requests in (16, 32):
        assert machine.run(policy, requests, 40).count(16) == 40


def test_speculation_is_left_off_where_it_does_not_pay_and_comes_back():
    machine = Machine(0.05, fixed=0.001, row=1e-4, free=0)
    policy = VerifyLenPolicy(WIDTHS)
    machine.run(policy, 64, 600)
    off = machine.run(policy, 64, 1000)
    assert off.count(1) > 0.9 * len(off)
    machine.chance, machine.row, machine.fixed = 0.95, 0.0, 0.01
    machine.run(policy, 64, 6000)
    assert 1 not in machine.run(policy, 64, 200)


def test_a_step_is_not_charged_with_what_ran_between():
    machine = Machine(0.8)
    policy = VerifyLenPolicy(WIDTHS)
    for _ in range(2000):
        machine.step(policy, 8)
        if machine.random.random() < 0.1:
            machine.now += 0.5
            policy.interrupt()
    assert policy.times.seconds
    for (size, width, _), seconds in policy.times.seconds.items():
        assert seconds == pytest.approx(machine.seconds(size, width), rel=1e-6)


def profiled(lag: int = 0) -> tuple[Machine, VerifyLenPolicy, int]:
    """A machine, a policy that knows its steps of 64 requests, and the best without prompts."""
    machine = Machine(0.8, fixed=0.004, row=3e-5, free=0, lag=lag)
    policy = VerifyLenPolicy(WIDTHS)
    policy.times.prior = {Step(64, width, 16): machine.seconds(64, width) for width in WIDTHS}
    alone = max(WIDTHS, key=lambda width: machine.rate(64, width))
    return machine, policy, alone


def under_prompts(
    policy: VerifyLenPolicy, machine: Machine, share: float, seconds: float, tokens: int = 100
) -> list:
    """Verify lengths of steps at 64 requests, a share of which prompts follow."""
    chosen = []
    for _ in range(1500):
        chosen.append(machine.step(policy, 64))
        if machine.random.random() < share:
            machine.run_prompts(seconds)
            policy.read_prompts(1, tokens)
    return chosen[-400:]


def rate_beside_prompts(machine: Machine, width: int, seconds: float) -> float:
    """Tokens a second where prompts follow every step."""
    alone = machine.rate(64, width)
    tokens = alone * machine.seconds(64, width)
    return tokens / (machine.seconds(64, width) + seconds)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_steps_commit_more_where_prompts_follow_each(lag):
    """What a pass of prompts takes is shared by all tokens of a step."""
    machine, policy, alone = profiled(lag)
    beside = max(WIDTHS, key=lambda width: rate_beside_prompts(machine, width, 0.02))
    assert beside > alone
    assert under_prompts(policy, machine, 0.0, 0.02).count(alone) > 350
    assert under_prompts(policy, machine, 1.0, 0.02).count(beside) > 350


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_the_time_of_prompts_is_found_however_late_the_clock_shows_it(share, lag):
    machine, policy, _ = profiled(lag)
    policy.prompts.pass_seconds = lambda tokens: 1e-4 * tokens
    under_prompts(policy, machine, share, 0.03, tokens=101)
    assert policy.prompts.seconds_of_pass() == pytest.approx((0.02, 0.01), rel=0.15)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_tokens_of_prompts_change_nothing(lag):
    """As many are read for the same text, however many tokens a step commits."""
    machine, policy, alone = profiled(lag)
    policy.prompts.pass_seconds = lambda tokens: 1e-4 * tokens
    assert under_prompts(policy, machine, 1.0, 0.02, tokens=200).count(alone) > 350


def test_prompts_wait_where_a_pass_saves_more_than_empty_slots_cost():
    machine, policy, _ = profiled()
    policy.may_wait = True
    under_prompts(policy, machine, 0.0, 0.02)
    assert policy.wait_below == 0
    under_prompts(policy, machine, 0.5, 0.02)
    often = policy.wait_below
    step = machine.seconds(64, 8)
    # Of a pass of 20 ms, e^-0.5 is not saved; a waiting prompt's slot is a 64th of a step.
    assert often == pytest.approx(0.02 * (1 - math.exp(-0.5)) * 64 / step, rel=0.4)
    under_prompts(policy, machine, 1.0, 0.02)
    assert policy.wait_below > often
    # Where another prompt hardly ever comes, none waits for it.
    under_prompts(policy, machine, 0.05, 0.02)
    assert policy.wait_below == 0
    under_prompts(policy, machine, 1.0, 0.02)
    policy.weight = 0.0
    machine.run(policy, 64, 16)
    assert policy.wait_below == 0


def test_a_pass_that_verifies_too_is_priced_by_the_rows_that_prompts_add():
    """Rows beyond 300 take 0.1 ms each; 100 tokens of prompts come to 250 other rows."""
    load = PromptLoad()
    load.pass_seconds = lambda rows: 1e-4 * max(0, rows - 300)
    for _ in range(40 * WINDOW):
        load.note(0.02, 1, 100, 250)
    assert load.seconds_of_pass() == pytest.approx((0.015, 0.005), rel=1e-3)
    # In a pass of their own they take nothing beyond what any pass takes.
    alone = PromptLoad()
    alone.pass_seconds = load.pass_seconds
    for _ in range(40 * WINDOW):
        alone.note(0.02, 1, 100)
    assert alone.seconds_of_pass() == pytest.approx((0.02, 0.0), rel=1e-3)


def test_rare_prompts_change_nothing():
    """They follow the tokens, however many a step commits."""
    machine, policy, alone = profiled()
    assert under_prompts(policy, machine, 0.02, 0.02).count(alone) > 350


def test_an_idle_engine_is_no_prompt():
    machine, policy, alone = profiled()
    for _ in range(400):
        machine.step(policy, 64)
        machine.now += 5.0
        policy.read_prompts(1, 100)
    assert machine.run(policy, 64, 40).count(alone) >= 31


def test_a_pause_of_the_host_hardly_counts():
    machine = Machine(0.8)
    policy = VerifyLenPolicy((16,))
    machine.run(policy, 8, 100)
    machine.now += 3600.0
    machine.run(policy, 8, 1)
    assert policy.times.seconds[8, 16, 16] < 1.2 * machine.seconds(8, 16)


def test_batches_between_captured_sizes_share_their_times():
    machine = Machine(0.8)
    policy = VerifyLenPolicy(WIDTHS, sizes=(1, 2, 4, 8))
    for requests in (5, 6, 7, 8) * 200:
        machine.step(policy, requests)
    assert {step.size for step in policy.times.seconds} == {8}


def test_latency_verifies_more_than_throughput():
    counts = []
    for weight in (0.0, 0.5, 1.0):
        machine = Machine(0.7, fixed=0.001, row=1e-4, free=0)
        policy = VerifyLenPolicy(WIDTHS, latency_vs_throughput=weight)
        machine.run(policy, 32, 1000)
        widths = machine.run(policy, 32, 500)
        counts.append(sum(widths) / len(widths))
    assert counts[0] > counts[1] > counts[2]
    assert counts[0] >= 12


def test_drafts_are_counted():
    policy = VerifyLenPolicy((1, 4, 8))
    machine = Machine(0.7, row=1e-4, free=0)
    widths = machine.run(policy, 16, 100)
    summary = policy.summary()
    assert summary["steps"] == {width: widths.count(width) for width in (1, 4, 8)}
    assert summary["drafts_verified"] == 16 * sum(width - 1 for width in widths)
    assert summary["drafts_saved"] == 16 * sum(8 - width for width in widths)
    assert summary["drafts_proposed"] == 16 * 7 * (100 - widths.count(1))


def test_trials_take_few_steps_and_are_counted():
    policy, machine = VerifyLenPolicy(WIDTHS), Machine(0.85, row=5e-5, free=0, lag=0)
    machine.run(policy, 16, 4000)
    before, best = policy.probed, max(WIDTHS, key=lambda width: machine.rate(16, width))
    assert before > 0
    later = machine.run(policy, 16, 20000)
    probed = policy.probed - before
    assert 0 < probed <= 0.005 * len(later)
    assert sum(width != best for width in later) <= probed


def test_rows_beyond_a_block_save_nothing():
    policy = VerifyLenPolicy((1, 4, 12), block=4)
    widths = Machine(0.7, row=1e-4, free=0).run(policy, 16, 100)
    summary = policy.summary()
    assert {1, 4, 12} == set(widths)
    assert summary["drafts_verified"] == 16 * sum(width - 1 for width in widths)
    assert summary["drafts_saved"] == 16 * 3 * widths.count(1)
    assert summary["drafts_proposed"] == 16 * (3 * widths.count(4) + 11 * widths.count(12))


def test_growth_adds_up_to_what_was_counted():
    policy, machine = VerifyLenPolicy((1, 4, 8)), Machine(0.7, row=1e-4, free=0)
    before: dict[str, int] = {}
    added = dict.fromkeys(policy.counts(), 0)
    assert growth(policy.counts(), before) == added
    for steps in (1, 40, 59):
        machine.run(policy, 16, steps)
        now = policy.counts()
        for name, count in growth(now, before).items():
            added[name] += count
        before = now
    summary = policy.summary()
    assert added == {
        "probed": summary["probe_steps"],
        "shortened": 0,
        "waited": summary["prompt_wait_steps"],
        **{name: summary[f"drafts_{name}"] for name in ("proposed", "verified", "saved")},
        **{f"steps:{width}": summary["steps"][width] for width in (1, 4, 8)},
    }
    assert growth(policy.counts(), before) == {}
    assert growth({"saved": 2}, {"saved": 3}) == {"saved": 2}  # begun anew


def test_processes_that_agree_choose_alike_whatever_their_clocks_say():
    """One knows a profile and decides; the other tries what it does not know, and hears."""
    said: list[int] = []
    overruled = 0

    def lead(width: int) -> int:
        said.append(width)
        return width

    def follow(width: int) -> int:
        nonlocal overruled
        overruled += width != said[0]
        return said.pop(0)

    first, second = (VerifyLenPolicy(WIDTHS, (1, 8, 64), agree=agree) for agree in (lead, follow))
    first.may_wait = second.may_wait = True
    quick, slow = Machine(0.8), Machine(0.3, row=1e-3, free=0, noise=0.4)
    first.times.prior = {
        Step(size, rows, 16): quick.seconds(size, rows) for size in (1, 8) for rows in WIDTHS
    }
    events = random.Random(0)
    requests, widths, waits = 8, set(), set()
    for _ in range(6000):
        if events.random() < 0.02:
            requests = events.randint(1, 80)
            first.interrupt()
            second.interrupt()
        width = quick.step(first, requests)
        assert slow.step(second, requests) == width
        assert not said
        assert first.wait_below == second.wait_below
        widths.add(width)
        waits.add(first.wait_below)
        if events.random() < 0.3:
            for policy, machine in ((first, quick), (second, slow)):
                machine.run_prompts(events.uniform(0.001, 0.03))
                policy.read_prompts(1, 100)
    assert overruled > 100
    assert len(widths) > 4
    assert len(waits) > 4
    # Only the one that decides knows which steps are trials.
    one, other = ({**policy.counts(), "probed": 0} for policy in (first, second))
    assert one == other


def test_limits_are_kept():
    policy = VerifyLenPolicy(choose_verify_lens(16, 2, 5))
    machine = Machine(0.99, row=0.0)
    assert set(machine.run(policy, 4, 2000)) == {3, 4, 5, 6}


class Halver(Machine):
    """Drafts blocks of 16 or 8 rows; a draft pass takes as long as it has rows.

    Args:
        lost: share of its drafts that a shorter block gets wrong beyond a whole one.
        drafted: seconds of a request's row in the draft pass.
    """

    def __init__(self, chance: float, lost: float = 0.0, drafted: float = 4e-6) -> None:
        super().__init__(chance, row=2e-5, free=200)
        self.lost, self.drafted, self.lengths = lost, drafted, []
        self.asked: dict[int, list[float]] = {}

    def expected(self, draft: int) -> list[float]:
        chance = self.chance * (1 - self.lost * (draft == 8))
        return list(itertools.accumulate(chance**k for k in range(draft)))

    def seconds_of(self, requests: int, width: int, draft: int) -> float:
        drafting = requests * draft * self.drafted * (width > 1)
        return self.fixed + drafting + self.row * max(0, requests * width - self.free)

    def best(self, requests: int) -> Lengths:
        choices = [Lengths(w, 16) for w in WIDTHS] + [Lengths(w, 8) for w in WIDTHS if 1 < w <= 8]
        return max(
            choices,
            key=lambda choice: (
                self.expected(choice.draft)[choice.verify - 1] / self.seconds_of(requests, *choice)
            ),
        )

    def policy(self) -> VerifyLenPolicy:
        """What is expected of a draft length is what its last blocks were like."""
        policy = VerifyLenPolicy(WIDTHS, expected=lambda: self.asked[16])
        policy.add_short_blocks(8, lambda: self.asked.get(8, self.asked[16]))
        self.asked[16] = self.expected(16)
        return policy

    def step(self, policy: VerifyLenPolicy, requests: int) -> int:
        width = policy.choose(requests, self.now)
        self.lengths.append(Lengths(width, policy.draft_len))
        if width > 1:
            self.asked[policy.draft_len] = self.expected(policy.draft_len)
        self.pending.append(self.seconds_of(requests, *self.lengths[-1]))
        if len(self.pending) > self.lag:
            self.now += self.pending.pop(0)
        return width


@pytest.mark.parametrize(
    ("chance", "lost", "requests", "short"),
    [(0.75, 0.0, 128, True), (0.98, 0.0, 8, False), (0.75, 0.2, 32, False)],
)
def test_shorter_blocks_are_drafted_where_they_pay(chance, lost, requests, short):
    """Not where long ones are verified, nor where the drafter does worse with them."""
    machine = Halver(chance, lost)
    best = machine.best(requests)
    assert (best.draft == 8) is short
    policy = machine.policy()
    machine.run(policy, requests, 6000)
    later = machine.lengths[2000:]
    assert later.count(best) > 0.98 * len(later)
    assert policy.shortened == sum(draft == 8 for _, draft in machine.lengths)
    summary = policy.summary()
    assert summary["short_block_steps"] == policy.shortened


def test_blocks_get_longer_again_when_drafts_get_better():
    machine = Halver(0.7)
    policy = machine.policy()
    machine.run(policy, 32, 1000)
    assert machine.lengths[-100:].count(machine.best(32)) > 90
    assert machine.best(32).draft == 8
    machine.chance = 0.99
    assert machine.best(32).draft == 16
    # A trial of whole blocks comes after 2,048 steps at the latest.
    machine.run(policy, 32, 3000)
    assert machine.lengths[-100:].count(machine.best(32)) > 90


def test_proposed_drafts_are_those_of_the_block_that_was_drafted():
    policy = VerifyLenPolicy((1, 4, 16))
    policy.add_short_blocks(8)
    assert policy.choices[3:] == [Lengths(4, 8)]
    machine = Halver(0.5)
    machine.asked = {8: machine.expected(8), 16: machine.expected(16)}
    machine.run(policy, 64, 400)
    drafted = sum(draft - 1 for width, draft in machine.lengths if width > 1)
    verified = sum(width - 1 for width, _ in machine.lengths)
    assert policy.counts()["proposed"] == 64 * drafted
    assert policy.counts()["saved"] == 64 * (drafted - verified) + 64 * 15 * sum(
        width == 1 for width, _ in machine.lengths
    )
