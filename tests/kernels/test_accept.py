"""Acceptance of blocks in one launch is the core's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_plugin.kernels.accept import Accepted, Sampled, accept, accept_naive
from tests.helpers.kernel_helpers import DEVICE, integers, random

pytestmark = pytest.mark.usefixtures("kernel_device")
BATCHES = st.sampled_from([0, 1, 5, 64])
COUNTS = st.sampled_from([0, 1, 3, 7, 15])


def equal(out: Accepted, reference: Accepted) -> None:
    for name, one, other in zip(out._fields, out, reference, strict=True):
        assert torch.equal(one, other), name
        assert one.dtype == other.dtype, name


def mixed(drafts: Tensor, target: Tensor, share: float, seed: int) -> Tensor:
    """``target`` in about ``share`` of the entries, else ``drafts``."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(drafts.shape, generator=generator, device="cpu") < share
    return torch.where(same.to(DEVICE), target, drafts)


@settings(max_examples=40, deadline=None)
@given(
    batch=BATCHES,
    count=COUNTS,
    vocabulary=st.sampled_from([9, 97, 5000]),
    drawn=st.booleans(),
    close=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 100),
)
def test_accept(batch, count, vocabulary, drawn, close, seed):
    if vocabulary > 1000:
        batch = min(batch, 5)
    target = torch.softmax(3 * random(batch, count + 1, vocabulary, seed=seed), dim=-1)
    # Greedy rows put all on one token.
    target[: batch // 4] = torch.nn.functional.one_hot(
        target[: batch // 4].argmax(dim=-1), vocabulary
    ).float()
    other = torch.softmax(3 * random(batch, count, vocabulary, seed=seed + 1), dim=-1)
    rows = mixed(torch.zeros(batch, count), torch.ones(batch, count), close, seed)[..., None]
    draft_probs = torch.where(rows > 0, target[:, :-1], other)
    ranked = draft_probs.argsort(dim=-1, descending=True)
    drafts = ranked.gather(-1, integers(0, 3, batch, count, 1, seed=seed))[..., 0]
    drafts = mixed(drafts, torch.full_like(drafts, -1), 0.05, seed + 2)
    seeds = integers(0, 1 << 62, batch, seed=seed)
    sampled = Sampled(target, draft_probs if drawn else None, seeds)
    positions = integers(0, 1 << 33, batch)
    equal(accept(drafts, sampled, positions), accept_naive(drafts, sampled, positions))


def test_drafts_that_were_not_verified_have_no_row_of_the_target():
    batch, count, vocabulary = 40, 6, 97
    target = torch.softmax(3 * random(batch, count + 1, vocabulary), dim=-1)
    draft_probs = torch.softmax(3 * random(batch, count, vocabulary, seed=1), dim=-1)
    drafts = draft_probs.argmax(dim=-1)
    verified = integers(0, count + 1, batch)
    kept = torch.arange(count + 1) <= verified[:, None]
    cut = drafts.masked_fill(~kept[:, 1:], -1)
    rows = torch.minimum(kept.flatten().cumsum(0) - 1, kept.sum() - 1).view(batch, -1)
    seeds, positions = integers(0, 1 << 62, batch), integers(0, 100, batch)
    for probs in (draft_probs, None):
        sampled = Sampled(target[kept].contiguous(), probs, seeds, rows.contiguous())
        unverified = drafts.masked_fill(~kept[:, 1:], -1)
        expected = accept_naive(unverified, Sampled(target, probs, seeds), positions)
        for run in (accept, accept_naive):
            equal(run(cut, sampled, positions), expected)


@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("cut", [False, True])
def test_probabilities_of_candidates_alone(width, cut):
    """The same as with their distributions spread over the vocabulary."""
    batch, count, vocabulary = 40, 6, 5000
    target = torch.softmax(5 * random(batch, count + 1, vocabulary), dim=-1)
    # Each the target's likeliest, some with other probabilities: accepted and rejected ones.
    candidates = target[:, :-1].topk(width, dim=-1).indices.contiguous()
    probs = torch.softmax(2 * random(batch, count, width, seed=1), dim=-1)
    drafts = candidates.gather(-1, integers(0, width, batch, count, 1))[..., 0]
    seeds, positions = integers(0, 1 << 62, batch), integers(0, 100, batch)
    spread = torch.zeros(batch, count, vocabulary).scatter_(-1, candidates, probs)
    rows = torch.arange(batch * (count + 1)).view(batch, -1) if cut else None
    given = target.flatten(0, 1) if cut else target
    dense = accept_naive(drafts, Sampled(target, spread, seeds), positions)
    assert 0 < int(dense.num_accepted.sum()) < batch * count
    for run in (accept, accept_naive):
        equal(run(drafts, Sampled(given, probs, seeds, rows, candidates), positions), dense)


def test_repeating_changes_nothing():
    target = torch.softmax(3 * random(64, 16, 500), dim=-1)
    drafts = target[:, :-1].argmax(dim=-1)
    sampled = Sampled(target, None, integers(0, 1 << 62, 64))
    first = accept(drafts, sampled, integers(0, 100, 64))
    # A GPU's programs race, the interpreter's run one after the other.
    for _ in range(5 if DEVICE.type == "cuda" else 1):
        equal(accept(drafts, sampled, integers(0, 100, 64)), first)


def test_faulty_arguments():
    drafts, positions = torch.zeros(2, 3).long(), torch.arange(2)
    target = Sampled(torch.zeros(2, 4, 9), None, positions)
    draft_probs = torch.zeros(2, 3, 8)
    for arguments, message in (
        ((drafts.int(), target, positions), "drafts must be int64"),
        ((drafts, target, positions.int()), "anchor_positions must be"),
        ((drafts, target._replace(seed=positions[:1]), positions), r"seed must be int64 \[2\]"),
        (
            (drafts, target._replace(target_probs=torch.zeros(2, 3, 9)), positions),
            r"target_probs must be contiguous float32 \[2, 4, 9\]",
        ),
        (
            (drafts, target._replace(draft_probs=draft_probs), positions),
            r"draft_probs must be contiguous float32 \[2, 3, 9\]",
        ),
        (
            (drafts, Sampled(torch.zeros(5, 9), None, positions, drafts), positions),
            r"rows must be int64 \[2, 4\]",
        ),
        (
            (drafts, target._replace(candidates=draft_probs.long()), positions),
            r"candidates must be contiguous int64 \[2, 3, 'C'\], beside draft_probs",
        ),
        (
            (
                drafts,
                target._replace(draft_probs=draft_probs, candidates=draft_probs[..., :5].long()),
                positions,
            ),
            r"draft_probs must be contiguous float32 \[2, 3, 5\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            accept(*arguments)
