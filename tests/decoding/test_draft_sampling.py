"""Which proposals are accepted most, and that choosing among them keeps the distribution."""

import pytest
import torch

from dflash_plugin.decoding.draft_sampling import (
    ENOUGH,
    FACTORS,
    MARGIN,
    WINDOW,
    AcceptanceEstimate,
    expected_acceptance,
    sharpen,
    start,
)
from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors
from dflash_plugin.decoding.verify import verify_drawn
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.select_path import Limits, select_path_naive
from tests.decoding.test_verify import DRAFTS, TRIALS, VOCABULARY, p_value, tables

CPU = torch.device("cpu")


def tensors(*params: SamplingParams) -> SamplingTensors:
    return SamplingTensors.build(params, CPU)


def one_hot(token: int) -> torch.Tensor:
    return torch.eye(VOCABULARY)[token]


@pytest.mark.parametrize("temperature", [0.5, 0.75, 1.0])
def test_a_sharper_distribution_is_the_softmax_at_a_part_of_the_temperature(temperature):
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    found = sharpen(torch.softmax(logits, -1), torch.full((2, 5), temperature))
    torch.testing.assert_close(found, torch.softmax(logits / temperature, -1))


def test_the_likeliest_token_is_the_limit_of_sharper_distributions():
    probs = torch.tensor([[0.4, 0.4, 0.2], [0.0, 0.1, 0.9]])
    assert sharpen(probs, torch.zeros(2)).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_token_without_probability_gets_none():
    probs = torch.tensor([[0.5, 0.0, 0.5]])
    for factor in FACTORS:
        assert float(sharpen(probs, torch.tensor([factor]))[0, 1]) == 0


def test_expected_acceptance_is_the_share_of_drafts_that_rejection_sampling_keeps():
    p, q = tables(0)
    expected = expected_acceptance(p[:1], q[:1])[0]
    generator = torch.Generator().manual_seed(0)
    for column, factor in enumerate(FACTORS):
        proposal = sharpen(q[0], torch.tensor(factor)).expand(TRIALS, -1)
        drawn = sample(proposal, torch.rand(TRIALS, generator=generator))
        ratio = p[0, drawn] / proposal[0, drawn]
        kept = torch.rand(TRIALS, generator=generator) < ratio
        assert float(kept.float().mean()) == pytest.approx(float(expected[column]), abs=0.005)


def observed(
    estimate: AcceptanceEstimate,
    params: SamplingParams,
    p: torch.Tensor,
    q: torch.Tensor,
    accepted: int,
    times: int = int(ENOUGH),
) -> None:
    """Passes of one request with the same distributions [K, V]."""
    for _ in range(times):
        estimate.observe(
            tensors(params), p[None], q[None], torch.tensor([accepted]), torch.tensor([True])
        )


def chosen(estimate: AcceptanceEstimate, params: SamplingParams, seeded: bool = False) -> list:
    return estimate.factors(tensors(params), torch.tensor([seeded]))[0].tolist()


def test_each_position_takes_what_is_accepted_most_there():
    """The likeliest token where the target is sure of it, draws where p and q are alike."""
    params, estimate = SamplingParams(1.0), AcceptanceEstimate(3, CPU)
    alike = torch.tensor([0.3, 0.3, 0.2, 0.2, 0.0, 0.0])
    sure = torch.tensor([0.6, 0.4, 0.0, 0.0, 0.0, 0.0])
    p = torch.stack([alike, one_hot(0), alike])
    q = torch.stack([alike, sure, alike])
    observed(estimate, params, p, q, accepted=1)
    # Nothing is known of the last position: no pass accepted the two drafts before it.
    assert chosen(estimate, params) == [1.0, 0.0, float(start(tensors(params))[0])]


@pytest.mark.parametrize(("gain", "expected"), [(MARGIN / 2, 1.0), (2 * MARGIN, 0.0)])
def test_draws_stay_until_another_way_gains_more_than_chance(gain, expected):
    params, estimate = SamplingParams(1.0), AcceptanceEstimate(1, CPU)
    q = torch.tensor([[1 - gain, gain, 0.0, 0.0, 0.0, 0.0]])
    observed(estimate, params, one_hot(0)[None], q, accepted=0)
    assert chosen(estimate, params) == [expected]


def test_requests_learn_from_their_kind_alone_and_those_with_a_seed_from_none():
    estimate, unlike = AcceptanceEstimate(1, CPU), SamplingParams(0.4)
    first = [float(start(tensors(unlike))[0])]
    params = SamplingParams(1.0)
    q = torch.tensor([[0.6, 0.4, 0.0, 0.0, 0.0, 0.0]])
    observed(estimate, params, one_hot(0)[None], q, accepted=0)
    assert chosen(estimate, params) == chosen(estimate, SamplingParams(1.05)) == [0.0]
    assert chosen(estimate, unlike) == first
    limited = SamplingParams(1.0, top_p=0.9)
    assert chosen(estimate, limited) == [float(start(tensors(limited))[0])]
    assert chosen(estimate, params, seeded=True) == [float(start(tensors(params))[0])]


def test_a_request_that_does_not_count_is_not_learnt_from():
    estimate, params = AcceptanceEstimate(1, CPU), SamplingParams(1.0)
    row = one_hot(0)[None, None].expand(2, 1, -1)
    estimate.observe(
        tensors(params, params), row, row, torch.tensor([0, 0]), torch.tensor([True, False])
    )
    assert float(estimate.rows.sum()) == 1


def test_a_change_of_traffic_is_followed():
    """Within some windows of what was measured last."""
    estimate, params = AcceptanceEstimate(1, CPU), SamplingParams(1.0)
    q = torch.tensor([[0.6, 0.4, 0.0, 0.0, 0.0, 0.0]])
    observed(estimate, params, q, q, accepted=0, times=int(WINDOW) + 100)
    assert chosen(estimate, params) == [1.0]
    assert float(estimate.rows.max()) == WINDOW
    observed(estimate, params, one_hot(0)[None], q, accepted=0, times=int(2 * WINDOW))
    assert chosen(estimate, params) == [0.0]


def pairs(propose, said=None, learn=None) -> tuple:
    """Counts of the first two committed tokens behind token 0, and what the target alone gives.

    Args:
        propose: gives the drafts [TRIALS, K] of a pass and what they are drawn from [TRIALS, K, V],
            from the last committed tokens and noise [TRIALS, K].
        said: gives what verification is told that they were drawn from; the truth where None.
        learn: gets a pass's target rows and numbers of accepted drafts.
    """
    p, _ = tables(1)
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    last = torch.zeros(TRIALS, dtype=torch.int64)
    committed = torch.full((TRIALS, 2), -1)
    length = torch.zeros(TRIALS, dtype=torch.int64)
    rows = torch.arange(TRIALS)
    while bool((committed < 0).any()):
        drafts, proposal = propose(last, uniform(TRIALS, DRAFTS))
        target = p[torch.cat([last[:, None], drafts], dim=1)]
        told = proposal if said is None else said(proposal)
        verdict = verify_drawn(
            drafts, target, told, uniform(TRIALS, DRAFTS), uniform(TRIALS, DRAFTS + 1)
        )
        if learn is not None:
            learn(target[:, :-1], verdict.num_accepted)
        for token in verdict.tokens.unbind(1):
            place = (token >= 0) & (length < 2)
            committed[rows[place], length[place]] = token[place]
            length += place
        last = verdict.next_token
    both = committed[:, 0] * VOCABULARY + committed[:, 1]
    counts = torch.bincount(both, minlength=VOCABULARY**2)
    expected = (p[0][:, None] * p).flatten() * TRIALS
    return counts.double().numpy(), expected.double().numpy()


def sharpened(choose, own=None):
    """Drafts of a drafter without a selector, whose factors [TRIALS, K] ``choose`` gives.

    From the last committed tokens, the drafts that would be drawn and the likeliest ones. ``own``
    [K, V] is the drafter's distribution.
    """
    own = (tables(1)[1] if own is None else own).expand(TRIALS, -1, -1)

    def propose(last, u):
        proposal = sharpen(own, choose(last, sample(own, u), own.argmax(-1)))
        return sample(proposal, u), proposal

    return propose


def by_the_text(last, drawn, likeliest) -> torch.Tensor:
    """A factor for each last committed token and position."""
    table = torch.tensor(FACTORS).repeat(VOCABULARY)[: VOCABULARY * DRAFTS]
    return table.view(VOCABULARY, DRAFTS)[last]


def by_the_draw(last, drawn, likeliest) -> torch.Tensor:
    """Broken: draws where the draw is not the likeliest token, else takes that for sure."""
    return (drawn != likeliest).float()


def test_a_choice_by_what_precedes_the_draws_keeps_the_distribution():
    assert p_value(*pairs(sharpened(by_the_text))) > 1e-3


def test_a_choice_that_looks_at_the_draws_does_not():
    assert p_value(*pairs(sharpened(by_the_draw))) < 1e-6


def blurred(proposal: torch.Tensor) -> torch.Tensor:
    """Broken: what verification is told is a tenth too close to uniform."""
    return 0.9 * proposal + 0.1 / VOCABULARY


@pytest.mark.parametrize(("said", "is_exact"), [(None, True), (blurred, False)])
@pytest.mark.parametrize("factor", FACTORS)
def test_every_factor_is_exact_with_what_drafts_were_drawn_from(factor, said, is_exact):
    factors = torch.full((TRIALS, DRAFTS), factor)
    fit = p_value(*pairs(sharpened(lambda *_: factors), said))
    assert fit > 1e-3 if is_exact else fit < 1e-6


@pytest.mark.parametrize(("said", "is_exact"), [(None, True), (blurred, False)])
def test_the_running_estimate_is_exact(said, is_exact):
    """It learns from every pass, and takes other factors in the next, of a drafter too unsure."""
    estimate = AcceptanceEstimate(DRAFTS, CPU)
    unsure = tables(1)[0][0].sqrt()
    own = (unsure / unsure.sum()).expand(DRAFTS, -1)
    params = tensors(SamplingParams(1.0)).of_rows(torch.zeros(TRIALS, dtype=torch.int64))
    none, every = torch.zeros(TRIALS, dtype=torch.bool), torch.ones(TRIALS, dtype=torch.bool)
    taken = []

    def choose(*_):
        factors = estimate.factors(params, none)
        taken.append(tuple(factors[0].tolist()))
        return factors

    def learn(target, accepted):
        estimate.observe(params, target, own.expand(TRIALS, -1, -1), accepted, every)

    fit = p_value(*pairs(sharpened(choose, own), said, learn))
    assert len(set(taken)) > 1
    assert fit > 1e-3 if is_exact else fit < 1e-6


def walk(limits: Limits):
    """Drafts along a selector's path through the four likeliest tokens of each position."""
    generator = torch.Generator().manual_seed(2)
    best = tables(1)[1].log().topk(4, dim=-1)
    candidates = best.indices.expand(TRIALS, -1, -1)
    gates = torch.randn(DRAFTS, 6, generator=generator).expand(TRIALS, -1, -1)
    codebooks = torch.randn(2, VOCABULARY, 6, generator=generator).unbind()
    temperature = torch.ones(TRIALS)

    def propose(last, u):
        path = select_path_naive(
            candidates,
            best.values.expand(TRIALS, -1, -1),
            gates,
            last,
            *codebooks,
            temperature,
            u,
            Limits(*(None if part is None else part.expand(TRIALS) for part in limits)),
        )
        spread = torch.zeros(TRIALS, DRAFTS, VOCABULARY)
        return path.tokens, spread.scatter_(-1, candidates, path.probs)

    return propose


@pytest.mark.parametrize(("said", "is_exact"), [(None, True), (blurred, False)])
@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_selectors_walk_within_limits_is_exact(top_k, top_p, said, is_exact):
    limits = Limits(torch.tensor([top_k]), torch.tensor([top_p]), torch.zeros(1))
    fit = p_value(*pairs(walk(limits), said))
    assert fit > 1e-3 if is_exact else fit < 1e-6
