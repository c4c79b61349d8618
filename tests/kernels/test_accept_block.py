"""Block verification in two launches is the core's, and commits the target's distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from dflash_plugin.decoding.verify import verify
from dflash_plugin.kernels.accept import Sampled
from dflash_plugin.kernels.accept_block import accept_block, accept_block_naive
from dflash_plugin.kernels.reference import sample
from tests.helpers.kernel_helpers import DEVICE, integers, random
from tests.kernels.test_accept import equal, mixed

pytestmark = pytest.mark.usefixtures("kernel_device")


def close_tables(batch: int, count: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distributions of target and drafter of which blocks are accepted in part."""
    logits = 3 * random(batch, count + 1, vocabulary, seed=seed)
    draft_logits = logits[:, :-1] + random(batch, count, vocabulary, seed=seed + 1)
    return torch.softmax(logits, dim=-1), torch.softmax(draft_logits, dim=-1)


def drawn(probs: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(probs.shape[:-1], generator=generator, device="cpu", dtype=torch.float64)
    return sample(probs, noise.to(DEVICE))


@settings(max_examples=15, deadline=None)
@given(
    batch=st.sampled_from([0, 1, 5]),
    count=st.sampled_from([0, 1, 3, 7, 15]),
    vocabulary=st.sampled_from([9, 97, 5000]),
    close=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 100),
)
def test_accept_block(batch, count, vocabulary, close, seed):
    target, draft_probs = close_tables(batch, count, vocabulary, seed)
    rows = mixed(torch.zeros(batch, count), torch.ones(batch, count), close, seed)[..., None]
    draft_probs = torch.where(rows > 0, target[:, :-1], draft_probs)
    # Greedy rows put all on one token.
    greedy = torch.nn.functional.one_hot(target[: batch // 4].argmax(dim=-1), vocabulary).float()
    target[: batch // 4], draft_probs[: batch // 4] = greedy, greedy[:, :-1]
    drafts = drawn(draft_probs, seed)
    drafts = mixed(drafts, torch.full_like(drafts, -1), 0.05, seed + 2)
    sampled = Sampled(target, draft_probs, integers(0, 1 << 62, batch, seed=seed))
    positions = integers(0, 1 << 29, batch)
    equal(accept_block(drafts, sampled, positions), accept_block_naive(drafts, sampled, positions))


def test_blocks_are_verified_as_the_core_verifies_them():
    target, draft_probs = close_tables(20, 5, 97)
    drafts = drawn(draft_probs, 0)
    seeds, positions = integers(0, 1 << 62, 20), integers(0, 100, 20)
    verdict = verify(drafts, target, draft_probs, seeds, positions)
    assert 0 < int(verdict.num_accepted.sum()) < 100
    for run in (accept_block, accept_block_naive):
        accepted = run(drafts, Sampled(target, draft_probs, seeds), positions)
        assert torch.equal(accepted.num_accepted, verdict.num_accepted.int())
        assert torch.equal(accepted.next_token, verdict.next_token)


def test_drafts_that_were_not_verified_have_no_row_of_the_target():
    batch, count, vocabulary = 20, 6, 97
    target, draft_probs = close_tables(batch, count, vocabulary)
    drafts = drawn(draft_probs, 0)
    kept = torch.arange(count + 1) <= integers(0, count + 1, batch)[:, None]
    drafts = drafts.masked_fill(~kept[:, 1:], -1)
    rows = torch.minimum(kept.flatten().cumsum(0) - 1, kept.sum() - 1).view(batch, -1)
    seeds, positions = integers(0, 1 << 62, batch), integers(0, 100, batch)
    expected = accept_block_naive(drafts, Sampled(target, draft_probs, seeds), positions)
    assert int(expected.num_accepted.sum()) > 0
    compact = Sampled(target[kept].contiguous(), draft_probs, seeds, rows.contiguous())
    for run in (accept_block, accept_block_naive):
        equal(run(drafts, compact, positions), expected)


@pytest.mark.parametrize("width", [1, 5, 16])
def test_probabilities_of_candidates_alone(width):
    """The same as with their distributions spread over the vocabulary."""
    batch, count, vocabulary = 8, 6, 5000
    target = torch.softmax(5 * random(batch, count + 1, vocabulary), dim=-1)
    best = target[:, :-1].topk(width, dim=-1)
    candidates = best.indices.contiguous()
    probs = torch.softmax(best.values.log() + random(batch, count, width, seed=1), dim=-1)
    drafts = candidates.gather(-1, drawn(probs, 0)[..., None])[..., 0]
    seeds, positions = integers(0, 1 << 62, batch), integers(0, 100, batch)
    spread = torch.zeros(batch, count, vocabulary).scatter_(-1, candidates, probs)
    rows = torch.arange(batch * (count + 1)).view(batch, -1)
    dense = accept_block_naive(drafts, Sampled(target, spread, seeds), positions)
    assert 0 < int(dense.num_accepted.sum()) < batch * count
    for run in (accept_block, accept_block_naive):
        whole = Sampled(target, probs, seeds, None, candidates)
        compact = Sampled(target.flatten(0, 1), probs, seeds, rows, candidates)
        equal(run(drafts, whole, positions), dense)
        equal(run(drafts, compact, positions), dense)


# A program takes the interpreter ten milliseconds.
TRIALS, VOCABULARY = 20_000 if DEVICE.type == "cuda" else 150, 3
P = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1]], device="cpu")
Q = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.1, 0.4]], device="cpu")


def fit(said: Tensor, sparse: bool) -> float:
    """p of the texts of two tokens behind token 0, under drafts from Q that are said to be others.

    The second draft is verified behind some of the first ones only.

    Args:
        said: [2, V], what verification is told.
        sparse: whether it is told so of candidates.
    """
    p, said = P.to(DEVICE), said.to(DEVICE).expand(TRIALS, -1, -1).contiguous()
    drafts = drawn(Q.to(DEVICE).expand(TRIALS, -1, -1), 0)
    target = p[torch.cat([torch.zeros_like(drafts[:, :1]), drafts], dim=1)]
    drafts[:, 1] = torch.where(drafts[:, 0] == 2, -1, drafts[:, 1])
    candidates = torch.tensor([2, 0, 1])
    judged = Sampled(target, said, integers(0, 1 << 62, TRIALS))
    if sparse:
        judged = judged._replace(
            draft_probs=said[..., candidates].contiguous(),
            candidates=candidates.expand(TRIALS, 2, -1).contiguous(),
        )
    accepted = accept_block(drafts, judged, integers(0, 100, TRIALS))
    first = torch.where(accepted.num_accepted > 0, drafts[:, 0], accepted.next_token)
    second = torch.where(accepted.num_accepted > 1, drafts[:, 1], accepted.next_token)
    second = torch.where(accepted.num_accepted > 0, second, drawn(p[first], 1))
    counts = torch.bincount(first * VOCABULARY + second, minlength=VOCABULARY**2)
    expected = P.double()[0][:, None] * P.double()
    return float(chisquare(counts.cpu(), expected.flatten() * (TRIALS / expected.sum())).pvalue)


@pytest.mark.parametrize("sparse", [False, True])
def test_texts_have_the_targets_distribution(sparse):
    assert fit(Q, sparse) > 1e-3


def test_with_a_wrong_proposal_they_have_not():
    assert fit(Q.flip(0), sparse=False) < 1e-6


def test_faulty_arguments():
    drafts, positions = torch.zeros(2, 3).long(), torch.arange(2)
    target = Sampled(torch.zeros(2, 4, 9), None, positions)
    with pytest.raises(ValueError, match="draft_probs must be given"):
        accept_block(drafts, target, positions)
    with pytest.raises(ValueError, match=r"draft_probs must be contiguous float32 \[2, 3, 9\]"):
        accept_block(drafts, target._replace(draft_probs=torch.zeros(2, 3, 8)), positions)
