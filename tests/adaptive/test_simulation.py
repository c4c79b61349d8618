"""How many drafts to verify: the models, the choice, and the simulator."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from dflash_plugin.adaptive.acceptance_model import AcceptanceModel
from dflash_plugin.adaptive.simulation.allocate import allocate
from dflash_plugin.adaptive.simulation.simulate import Adaptive, Fixed, Oracle, simulate
from dflash_plugin.adaptive.simulation.traces import Traces, record
from dflash_plugin.adaptive.step_cost import StepCost, interpolated
from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.decoding.verify import verify_sampled
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.reference import confidence
from dflash_plugin.train.features import OnlineFeatures, known_texts
from dflash_plugin.train.sequences import SequenceSet
from dflash_plugin.transformers import Engine, Request
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target


def test_confidence_is_the_log_odds_of_the_likeliest_token():
    logits = torch.tensor([[0.0, 2.0, -1.0], [5.0, 5.0, 5.0]])
    top = logits.softmax(dim=-1).max(dim=-1).values
    assert torch.allclose(confidence(logits), torch.logit(top), atol=1e-6)
    assert confidence(torch.tensor([0.0, 1000.0])).isfinite()


def made_up(
    batch: int, count: int, generator: torch.Generator, slope: float = 0.6, offset: float = -1.0
) -> tuple[Tensor, Tensor]:
    """Confidences [B, K], and how many drafts stand where they tell less than they say."""
    sure = 3 * torch.randn(batch, count, generator=generator) + 1
    stands = torch.rand(batch, count, generator=generator) < torch.sigmoid(slope * sure + offset)
    return sure, stands.long().cumprod(dim=1).sum(dim=1)


def test_the_model_begins_with_the_drafters_own_belief():
    sure = torch.tensor([[-2.0, 0.0, 3.0]])
    model = AcceptanceModel(3)
    assert torch.allclose(model.probabilities(sure), torch.sigmoid(sure))
    assert torch.allclose(model.survival(sure), torch.sigmoid(sure).cumprod(dim=1))


def calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> float:
    """Expected calibration error of probabilities [N] against outcomes bool [N]."""
    index = (probabilities * bins).long().clamp(max=bins - 1)
    predicted = torch.bincount(index, weights=probabilities.double(), minlength=bins)
    observed = torch.bincount(index, weights=outcomes.double(), minlength=bins)
    return float((predicted - observed).abs().sum() / probabilities.numel())


@pytest.mark.parametrize("trimmed", [False, True])
def test_the_model_learns_how_far_confidence_can_be_trusted(trimmed):
    """Also of blocks that are verified in part only, whose later drafts are never judged."""
    generator = torch.Generator().manual_seed(0)
    model = AcceptanceModel(4)
    sure, right = made_up(4000, 4, generator)
    before = calibration_error(model.survival(sure)[:, 0], right > 0)
    for _ in range(400):
        seen, accepted = made_up(16, 4, generator)
        verified = torch.full((16,), 4)
        if trimmed:
            verified = (model.survival(seen) > 0.3).sum(dim=1).clamp(min=1)
        model.observe(seen, torch.minimum(accepted, verified), verified)
    after = model.survival(sure)
    assert before > 0.1
    for position in range(4):
        assert calibration_error(after[:, position], right > position) < 0.03


def test_what_was_not_judged_teaches_nothing():
    model = AcceptanceModel(3)
    before = torch.stack(model.state[:2])
    sure = torch.full((5, 3), 2.0)
    model.observe(sure, torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long))
    assert torch.equal(torch.stack(model.state[:2]), before)
    # All fell at their first draft: the later positions were never judged.
    model.observe(sure, torch.zeros(5, dtype=torch.long), torch.full((5,), 3))
    after = torch.stack(model.state[:2])
    assert (after != before)[:, 0].all()
    assert torch.equal(after[:, 1:], before[:, 1:])


def test_a_hopeless_drafter_is_found_out_soon():
    generator = torch.Generator().manual_seed(1)
    model = AcceptanceModel(2)
    for _ in range(20):
        sure = 4 + torch.randn(8, 2, generator=generator)
        model.observe(sure, torch.zeros(8, dtype=torch.long), torch.full((8,), 2))
    assert float(model.survival(torch.full((1, 2), 4.0))[0, 0]) < 0.1


@pytest.mark.parametrize("peeks", [False, True])
def test_trimming_by_confidence_keeps_the_targets_distribution(peeks):
    """χ² of the first token; a rule that looks at the drawn token itself is found out."""
    rows, generator = 60_000, torch.Generator().manual_seed(3)
    draft = torch.tensor([0.55, 0.25, 0.15, 0.05])
    target = torch.tensor([0.25, 0.25, 0.25, 0.25])
    drawn = torch.multinomial(draft.expand(rows, -1), 1, generator=generator)
    sure = confidence(draft.log()).expand(rows, 1)
    if peeks:
        sure = torch.logit(draft[drawn])
    verified = (AcceptanceModel(1).survival(sure) > 0.2).sum(dim=1)
    assert int(verified.sum()) > 0
    verdict = verify_sampled(
        drawn,
        target.expand(rows, 2, -1),
        draft.expand(rows, 1, -1),
        torch.rand(rows, 1, generator=generator),
        torch.rand(rows, 2, generator=generator),
        verified,
    )
    counts = torch.bincount(verdict.tokens[:, 0], minlength=4)
    p = chisquare(counts, rows * target.double()).pvalue
    assert p < 1e-12 if peeks else p > 1e-3


def best_by_hand(survival: Tensor, sizes: list[int], seconds: list[float]) -> float:
    """The highest rate over all ways to verify first drafts that fit."""
    batch, count = survival.shape
    best = 0.0
    for drafts in itertools.product(range(count + 1), repeat=batch):
        used = batch + sum(drafts)
        gain = sum(float(row[:k].sum()) for row, k in zip(survival, drafts, strict=True))
        fitting = [s for size, s in zip(sizes, seconds, strict=True) if size >= used]
        if fitting:
            best = max(best, (batch + gain) / min(fitting))
    return best


@settings(max_examples=200, deadline=None)
@given(data=st.data(), batch=st.integers(1, 4), count=st.integers(1, 3))
def test_the_choice_is_the_best_there_is(data, batch, count):
    part = st.floats(0, 1, width=32)
    rows = data.draw(
        st.lists(st.lists(part, min_size=count, max_size=count), min_size=batch, max_size=batch)
    )
    survival = torch.tensor(rows).cumprod(dim=1)
    largest = batch * (count + 1)
    sizes = sorted(data.draw(st.sets(st.integers(batch, largest), min_size=1)))
    steps = data.draw(st.lists(st.floats(0.1, 1.0), min_size=len(sizes), max_size=len(sizes)))
    seconds = [sum(steps[: i + 1]) for i in range(len(steps))]
    made = allocate(survival, torch.tensor(sizes), torch.tensor(seconds))
    drafts = made.num_drafts.tolist()
    used = batch + sum(drafts)
    assert used <= sizes[int(made.size)]
    gain = sum(float(row[:k].sum()) for row, k in zip(survival, drafts, strict=True))
    assert float(made.expected) == pytest.approx(batch + gain, abs=1e-4)
    rate = (batch + gain) / seconds[int(made.size)]
    assert rate == pytest.approx(best_by_hand(survival, sizes, seconds), rel=1e-4)
    assert float(made.rate) == pytest.approx(rate, rel=1e-4)


def test_requests_that_no_size_holds_get_no_drafts():
    made = allocate(torch.ones(3, 2), torch.tensor([1, 2]), torch.tensor([1.0, 2.0]))
    assert made.num_drafts.tolist() == [0, 0, 0]


def test_costs_rise_and_take_the_next_size():
    # Something disturbed the pass of 1 when it was measured.
    cost = StepCost.measured({8: 2.0, 1: 1.0, 4: 0.9}, {2: 0.5}, fixed=0.1)
    assert [cost.verify_seconds(n) for n in (1, 2, 4, 5, 8)] == [0.9, 0.9, 0.9, 2.0, 2.0]
    assert cost.verify_seconds(16) == 4.0
    assert cost.draft_seconds(0) == 0.0
    assert cost.step_seconds(5, 2) == pytest.approx(2.6)


def test_costs_that_are_none():
    for verify in ({}, {0: 1.0}, {1: float("inf")}, {1: 0.0}):
        with pytest.raises(DFlashError, match="give"):
            StepCost.measured(verify, {})
    with pytest.raises(DFlashError, match="1 measured sizes"):
        interpolated({1: 2.0}, [1])


def test_between_measured_sizes_lie_straight_lines():
    found = interpolated({16: 1.0, 64: 2.0, 128: 4.0}, [1, 16, 40, 64, 96, 192])
    assert found == {1: 1.0, 16: 1.0, 40: 1.5, 64: 2.0, 96: 3.0, 192: 6.0}


def texts(good: float, seed: int = 0, length: int = 4000, count: int = 7) -> Traces:
    """Made-up texts whose confidences are honest."""
    generator = torch.Generator().manual_seed(seed)
    sure = 2 * torch.randn(length, count, generator=generator) + good
    stands = torch.rand(length, count, generator=generator) < torch.sigmoid(sure)
    right = stands.long().cumprod(dim=1).sum(dim=1)
    return Traces(sure.half(), right, torch.arange(0, length + 1, 100))


FREE = StepCost.measured({1 << n: 1.0 for n in range(13)}, {1 << n: 0.01 for n in range(9)})
# A machine at its limit: every token takes as long as the next.
DEAR = StepCost.measured(
    {n: 0.1 + n for n in (*range(1, 128), *range(128, 2049, 32))}, {1: 0.1, 256: 5.0}
)


@pytest.mark.parametrize("requests", [1, 16])
def test_where_tokens_are_free_all_are_verified(requests):
    traces = texts(1.0)
    found = simulate(traces, Adaptive(FREE, 7), FREE, requests, 200)
    whole = simulate(traces, Fixed(7), FREE, requests, 200)
    assert found.rate > 0.97 * whole.rate


def test_where_tokens_are_dear_only_sure_drafts_are_verified():
    traces = texts(1.0)
    found = simulate(traces, Adaptive(DEAR, 7), DEAR, 16, 400)
    best = max(simulate(traces, Fixed(k), DEAR, 16, 400).rate for k in range(8))
    oracle = simulate(traces, Oracle(DEAR), DEAR, 16, 400)
    assert 0.98 * best < found.rate <= 1.02 * oracle.rate
    assert 0 < found.verified < 16 * 400 * 4


def test_a_drafter_that_does_not_pay_is_switched_off_and_comes_back():
    hopeless, good = texts(-6.0), texts(3.0)
    policy = Adaptive(DEAR, 7)
    plain = simulate(hopeless, Fixed(0), DEAR, 8, 2000)
    found = simulate(hopeless, policy, DEAR, 8, 2000)
    assert found.rate > 0.98 * plain.rate
    assert found.verified < 8 * 2000 * 0.05
    policy.cost = FREE
    again = simulate(good, policy, FREE, 8, 2000)
    assert again.verified > 8 * 2000 * 0.3


@pytest.mark.parametrize("changes", [{}, DFLASH2], ids=["dflash", "dflash2"])
def test_traces_hold_what_the_core_drafts_at_every_position(changes):
    target = tiny_target()
    drafter = tiny_drafter(target, **changes)
    prompts = [[5, 6, 7, 8], [50, 51, 52]]
    texts = Engine(target, max_batch=2, max_length=64).generate(
        [Request(prompt, 12, stop_ids=[]) for prompt in prompts]
    )
    pairs = [(prompt, result.tokens) for prompt, result in zip(prompts, texts, strict=True)]
    sequences = SequenceSet.build(pairs)
    features = OnlineFeatures(tiny_target(), drafter.config.target_layer_ids)
    traces = record(drafter, known_texts(features, sequences, target.device))
    assert traces.starts.tolist() == [0, 11, 22]
    row = 0
    for prompt, text in pairs:
        for place in range(len(text) - 1):
            expected = answer(drafter, target, [*prompt, *text[:place]])
            assert expected.anchor == text[place]
            following = text[place + 1 :]
            agree = [a == b for a, b in zip(expected.drafts, following, strict=False)]
            run = next((i for i, same in enumerate(agree) if not same), len(agree))
            assert int(traces.right[row]) == run
            row += 1
    assert traces.confidence.shape == (22, drafter.config.num_draft_tokens)
    assert traces.confidence.float().std() > 0
    # A text that the drafter itself writes.
    drafted = answer(drafter, target, prompts[0])
    own = SequenceSet.build([(prompts[0], [drafted.anchor, *drafted.drafts])])
    again = record(drafter, known_texts(features, own, target.device))
    assert int(again.right[0]) == len(drafted.drafts)


def test_traces_are_kept_and_their_faults_named(tmp_path: Path):
    traces = texts(1.0, length=300)
    traces.save(tmp_path / "traces.safetensors")
    again = Traces.load(tmp_path / "traces.safetensors")
    assert torch.equal(again.right, traces.right)
    assert torch.equal(again.confidence, traces.confidence)
    assert again.tau == traces.tau > 1
    (tmp_path / "junk").write_bytes(b"nothing")
    for name in ("missing", "junk"):
        with pytest.raises(DFlashError, match="holds no traces"):
            Traces.load(tmp_path / name)
    Traces(traces.confidence[:5], traces.right, traces.starts).save(tmp_path / "cut")
    with pytest.raises(DFlashError, match="is not whole"):
        Traces.load(tmp_path / "cut")


def test_easy_requests_keep_their_speed_beside_hard_ones():
    """Half of the texts stand nearly whole, half hardly at all, where every draft costs."""
    easy, hard = texts(4.0), texts(-3.0)
    both = Traces(
        torch.cat([easy.confidence, hard.confidence]),
        torch.cat([easy.right, hard.right]),
        torch.cat([easy.starts, hard.starts[1:] + easy.starts[-1]]),
    )
    whole = simulate(both, Fixed(7), DEAR, 16, 600, mixed=True)
    found = simulate(both, Adaptive(DEAR, 7), DEAR, 16, 600, mixed=True)
    assert whole.easy_tokens > 4 * (whole.tokens - whole.easy_tokens)
    assert found.easy_tokens / found.seconds > 1.2 * whole.easy_tokens / whole.seconds
