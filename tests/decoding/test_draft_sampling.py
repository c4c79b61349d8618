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


def pairs(choose) -> tuple:
    """Counts of the first two committed tokens behind token 0, with changing proposals.

    Args:
        choose: gives the factors [TRIALS, K] of a pass from what earlier passes committed, the
            drafts that would be drawn and the likeliest ones.
    """
    p, q = tables(1)
    own = q.expand(TRIALS, -1, -1)
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    last = torch.zeros(TRIALS, dtype=torch.int64)
    committed = torch.full((TRIALS, 2), -1)
    length = torch.zeros(TRIALS, dtype=torch.int64)
    rows = torch.arange(TRIALS)
    while bool((committed < 0).any()):
        u = uniform(TRIALS, DRAFTS)
        factors = choose(last, sample(own, u), own.argmax(-1))
        proposal = sharpen(own, factors)
        drafts = sample(proposal, u)
        target = p[torch.cat([last[:, None], drafts], dim=1)]
        verdict = verify_drawn(
            drafts, target, proposal, uniform(TRIALS, DRAFTS), uniform(TRIALS, DRAFTS + 1)
        )
        for token in verdict.tokens.unbind(1):
            place = (token >= 0) & (length < 2)
            committed[rows[place], length[place]] = token[place]
            length += place
        last = verdict.next_token
    both = committed[:, 0] * VOCABULARY + committed[:, 1]
    counts = torch.bincount(both, minlength=VOCABULARY**2)
    expected = (p[0][:, None] * p).flatten() * TRIALS
    return counts.double().numpy(), expected.double().numpy()


def by_the_text(last, drawn, likeliest) -> torch.Tensor:
    """A factor for each last committed token and position."""
    table = torch.tensor(FACTORS).repeat(VOCABULARY)[: VOCABULARY * DRAFTS]
    return table.view(VOCABULARY, DRAFTS)[last]


def by_the_draw(last, drawn, likeliest) -> torch.Tensor:
    """Broken: draws where the draw is not the likeliest token, else takes that for sure."""
    return (drawn != likeliest).float()


def test_a_choice_by_what_precedes_the_draws_keeps_the_distribution():
    assert p_value(*pairs(by_the_text)) > 1e-3


def test_a_choice_that_looks_at_the_draws_does_not():
    assert p_value(*pairs(by_the_draw)) < 1e-6
