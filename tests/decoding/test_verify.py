"""Verification against brute force, and its distribution against the target's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dflash_plugin.decoding.sampling import (
    SamplingParams,
    SamplingTensors,
    block_seeds,
    probabilities,
)
from dflash_plugin.decoding.verify import (
    FinishReason,
    Verdict,
    commit,
    verify,
    verify_greedy,
    verify_sampled,
)
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream, uniforms

VOCABULARY, DRAFTS, TRIALS = 6, 3, 200_000
tokens = st.integers(0, 3)


@settings(deadline=None, max_examples=200)
@given(
    drafts=st.lists(st.integers(-1, 3), min_size=3, max_size=3),
    target=st.lists(tokens, min_size=4, max_size=4),
    count=st.integers(0, 3),
)
def test_greedy_acceptance_is_the_common_prefix(drafts, target, count):
    accepted = 0
    while accepted < count and drafts[accepted] == target[accepted]:
        accepted += 1
    verdict = verify_greedy(
        torch.tensor([drafts]), torch.tensor([target]), num_drafts=torch.tensor([count])
    )
    assert int(verdict.num_accepted) == accepted
    assert int(verdict.next_token) == target[accepted]
    assert verdict.tokens[0].tolist() == target[: accepted + 1] + [-1] * (3 - accepted)


@settings(deadline=None, max_examples=200)
@given(
    run=st.lists(tokens, min_size=1, max_size=5),
    stops=st.lists(tokens, max_size=2),
    remaining=st.integers(1, 6),
)
def test_commit_cuts_at_the_first_stop_and_at_the_limit(run, stops, remaining):
    kept, reason = [], FinishReason.NONE
    for token in run:
        kept.append(token)
        if token in stops:
            reason = FinishReason.STOP
        elif len(kept) == remaining:
            reason = FinishReason.LENGTH
        if reason:
            break
    padded = torch.tensor([run + [-1] * (5 - len(run))])
    stop_ids = torch.tensor([stops + [-1] * (3 - len(stops))])
    committed, finished, found = commit(
        padded, torch.tensor([len(run)]), stop_ids, torch.tensor([remaining])
    )
    assert int(committed) == len(kept)
    assert int(found) == reason
    assert bool(finished) == (reason != FinishReason.NONE)


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Markov target p(next | last) and a drafter q(position, next), some entries zero."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), dim=-1)
    p[:, 4] = 0
    q = torch.softmax(1.5 * torch.randn(DRAFTS, VOCABULARY, generator=generator), dim=-1)
    q[:, 1] = 0
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def pairs(verifier, point_mass: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the first two committed tokens after token 0, and what the target alone gives."""
    p, q = tables(seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    last = torch.zeros(TRIALS, dtype=torch.int64)
    first, second = torch.full((2, TRIALS), -1, dtype=torch.int64)
    while bool((second < 0).any()):
        if point_mass:
            drafts = q.argmax(-1).expand(TRIALS, -1)
            draft_probs = None
        else:
            draft_probs = q.expand(TRIALS, -1, -1)
            drafts = sample(draft_probs, uniform(TRIALS, DRAFTS))
        target = p[torch.cat([last[:, None], drafts], dim=1)]
        verdict = verifier(
            drafts, target, draft_probs, uniform(TRIALS, DRAFTS), uniform(TRIALS, DRAFTS + 1)
        )
        for column in range(DRAFTS + 1):
            token = verdict.tokens[:, column]
            place = token >= 0
            fill_second = place & (first >= 0) & (second < 0)
            fill_first = place & (first < 0)
            second = torch.where(fill_second, token, second)
            first = torch.where(fill_first, token, first)
        last = verdict.next_token
    counts = torch.bincount(first * VOCABULARY + second, minlength=VOCABULARY**2)
    expected = p[0][:, None] * p
    return counts.double().numpy(), (expected.flatten() * TRIALS).double().numpy()


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    possible = expected > 0
    if counts[~possible].sum() > 0:
        return 0.0
    return float(chisquare(counts[possible], expected[possible] * (TRIALS / expected.sum())).pvalue)


def accepts_by_target_alone(drafts, target, draft_probs, accept_u, next_u) -> Verdict:
    """Broken: forgets to divide by the draft's probability."""
    q = draft_probs.gather(-1, drafts[..., None])[..., 0].double()
    return verify_sampled(drafts, target, draft_probs, accept_u / q, next_u)


def redraws_from_target(drafts, target, draft_probs, accept_u, next_u) -> Verdict:
    """Broken: draws the correction from p instead of what the drafter left of it."""
    verdict = verify_sampled(drafts, target, draft_probs, accept_u, next_u)
    row = torch.arange(len(drafts))
    place = verdict.num_accepted
    redrawn = sample(target[row, place], next_u[row, place])
    columns = torch.arange(target.shape[1])
    committed = torch.where(columns == place[:, None], redrawn[:, None], verdict.tokens)
    return Verdict(place, redrawn, committed)


@pytest.mark.parametrize("point_mass", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_committed_pairs_follow_the_target(point_mass, seed):
    assert p_value(*pairs(verify_sampled, point_mass, seed)) > 1e-3


@pytest.mark.parametrize("broken", [accepts_by_target_alone, redraws_from_target])
def test_a_broken_verifier_fails_the_same_test(broken):
    assert p_value(*pairs(broken, point_mass=False)) < 1e-6


def test_a_broken_verifier_of_chosen_drafts_fails_too():
    assert p_value(*pairs(redraws_from_target, point_mass=True)) < 1e-6


def texts_by_seed(draft_noise) -> float:
    """p of three tokens behind token 0, drawn over several blocks with the noise of a seed each.

    Args:
        draft_noise: gives the seeds [TRIALS] of the drafts' noise from the requests' seeds and the
            blocks' anchors.
    """
    p = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1]])
    q = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]])
    generator = torch.Generator().manual_seed(7)
    seed = torch.randint(0, 1 << 62, (TRIALS,), generator=generator)
    last, anchors = torch.zeros(2, TRIALS, dtype=torch.int64)
    text = torch.full((TRIALS, 3), -1)
    draft_probs, rows = q.expand(TRIALS, -1, -1), torch.arange(TRIALS)
    while bool((text < 0).any()):
        places = anchors[:, None] + torch.arange(1, DRAFTS + 1)
        u = uniforms(draft_noise(seed, anchors), places, Stream.DRAFT)
        drafts = sample(draft_probs, u)
        target = p[torch.cat([last[:, None], drafts], dim=1)]
        verdict = verify(drafts, target, draft_probs, seed, anchors)
        for column, token in enumerate(verdict.tokens.unbind(1)):
            place = anchors + column
            fits = (token >= 0) & (place < 3)
            text[rows[fits], place[fits]] = token[fits]
        last, anchors = verdict.next_token, anchors + verdict.num_accepted + 1
    places = text @ torch.tensor([9, 3, 1])
    counts = torch.bincount(places, minlength=27)
    expected = (p[0][:, None, None] * p[..., None] * p).flatten() * TRIALS
    return p_value(counts.double().numpy(), expected.double().numpy())


def test_blocks_with_noise_of_their_own_follow_the_target():
    assert texts_by_seed(block_seeds) > 1e-3


def test_blocks_that_draw_a_position_again_with_the_same_noise_do_not():
    assert texts_by_seed(lambda seed, anchors: seed) < 1e-6


def test_invalid_and_uncounted_drafts_are_drawn_from_the_target():
    p, _ = tables(3)
    draws = 50_000
    drafts = torch.tensor([[-1, 2, 2]]).expand(draws, -1)
    target = p[torch.tensor([[0, 0, 2, 2]])].expand(draws, -1, -1)
    generator = torch.Generator().manual_seed(0)
    verdict = verify_sampled(
        drafts,
        target,
        None,
        torch.rand(draws, 3, generator=generator),
        torch.rand(draws, 4, generator=generator, dtype=torch.float64),
    )
    assert int(verdict.num_accepted.max()) == 0
    counts = torch.bincount(verdict.next_token, minlength=VOCABULARY).double().numpy()
    kept = p[0].numpy() > 0
    share = p[0].double().numpy()[kept]
    assert chisquare(counts[kept], share / share.sum() * draws).pvalue > 1e-3


def test_greedy_and_sampled_requests_share_a_batch():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    drafts = logits[:, :3].argmax(-1)
    params = SamplingTensors.build(
        [SamplingParams(), SamplingParams(temperature=1.0, seed=4)], torch.device("cpu")
    )
    probs = probabilities(logits, params)
    verdict = verify(drafts, probs, None, params.seed, torch.tensor([10, 20]))
    assert verdict.tokens[0].tolist() == logits[0].argmax(-1).tolist()
    alone = verify(drafts[1:], probs[1:], None, params.seed[1:], torch.tensor([20]))
    assert torch.equal(verdict.tokens[1:], alone.tokens)
