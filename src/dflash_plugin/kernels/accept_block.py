"""Block verification of drawn drafts, with the noise of ``uniforms``.

``block_verification`` has the rule and its source. The first launch sums what the target has left
behind each draft, for all drafts of all blocks at once; the second decides and draws.

Blocks that are verified in part stay exact, if whether a draft is verified depends on the drafts
before it alone. Write q(x) for the probability that the front x of a block is drafted. Acceptance
reaches the end of x with probability ``q(x) * joint(x)``:

- Where x is the last verified draft, its decision is yes with probability ``joint(x)``.
- Else let y be the draft behind it. By the same claim acceptance reaches y with probability
  ``q(x) * min(q(y), joint(x) * p(y))``, in sum over y ``q(x) * (joint(x) - left)``, and the
  decision at x gives the rest: ``(1 - joint(x) + left) * left / (left + 1 - joint(x)) = left``.

Behind x a token y is committed as a draft with ``q(x) * min(q(y), joint(x) * p(y))``, as the token
drawn behind the cut with ``q(x) * max(joint(x) * p(y) - q(y), 0)``. The sum is ``q(x) * joint(x) *
p(y)``: given that x was reached, y has the target's probability. Only joint(x) and left are used,
which are known before y is drafted, so the claim holds wherever each front ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.accept import (
    Accepted,
    Sampled,
    accept,
    check_sampled,
    dense,
    empty_accepted,
)
from dflash_plugin.kernels.block_verification import verify_block
from dflash_plugin.kernels.common import uniform
from dflash_plugin.kernels.language import tl, triton
from dflash_plugin.kernels.next_token import draw_next, proposed
from dflash_plugin.kernels.uniforms import Stream, uniforms_naive


@triton.jit
def _decide(
    drafts,
    target_probs,
    draft_probs,
    target_rows,
    candidates,
    joint_out,
    decisions_out,
    vocabulary,
    drafts_stride,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_VOCABULARY: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    index = tl.arange(0, BLOCK)
    is_draft = index < COUNT
    draft = tl.load(drafts + request * drafts_stride + index, mask=is_draft, other=0)
    # The first draft that is invalid ends the block.
    length = tl.min(tl.where(is_draft & (draft >= 0), COUNT, tl.minimum(index, COUNT)), axis=0)
    counts = index < length
    rows = request * (COUNT + 1) + index
    if target_rows is not None:
        rows = tl.load(target_rows + rows, mask=counts, other=0)
    p = tl.load(target_probs + rows * vocabulary + draft, mask=counts, other=0.0)
    block_row = request * COUNT + index
    q = proposed(
        draft_probs, candidates, block_row, draft, counts, vocabulary, CANDIDATES, BLOCK_CANDIDATES
    )
    ratios = p.to(tl.float64) / tl.where(counts, q, 1.0)
    joint = tl.sum(tl.where(index == 0, 1.0, 0.0).to(tl.float64), axis=0)
    for before in range(0, place + 1):
        ratio = tl.sum(tl.where(index == before, ratios, 0.0), axis=0)
        joint = tl.minimum(joint * ratio, 1.0)
    # What the target has left behind this draft, where another one follows.
    follows = place + 1 < length
    row = request * (COUNT + 1) + place + 1
    if target_rows is not None:
        row = tl.load(target_rows + row, mask=follows, other=0)
    target = target_probs + row * vocabulary
    scale = joint.to(tl.float32)
    if candidates is None:
        left = joint * 0.0
        drafter = draft_probs + (request * COUNT + place + 1) * vocabulary
        for start in range(0, tl.where(follows, vocabulary, 0), BLOCK_VOCABULARY):
            at = start + tl.arange(0, BLOCK_VOCABULARY)
            inside = at < vocabulary
            wanted = scale * tl.load(target + at, mask=inside, other=0.0)
            taken = tl.load(drafter + at, mask=inside, other=0.0)
            left += tl.sum(tl.maximum(wanted - taken, 0.0).to(tl.float64), axis=0)
    else:
        # Only candidates take something of the target's whole, which is one.
        candidate = tl.arange(0, BLOCK_CANDIDATES)
        known = candidate < tl.where(follows, CANDIDATES, 0)
        at = (request * COUNT + place + 1) * CANDIDATES + candidate
        token = tl.load(candidates + at, mask=known, other=0)
        wanted = scale * tl.load(target + token, mask=known, other=0.0)
        taken = tl.minimum(wanted, tl.load(draft_probs + at, mask=known, other=0.0))
        left = tl.maximum(joint - tl.sum(taken.to(tl.float64), axis=0), 0.0)
    # Where all is covered a later draft is accepted too.
    share = tl.where(joint < 1, left / tl.where(joint < 1, left + 1 - joint, 1.0), 1.0)
    decision = tl.where(follows, share, tl.where(place < length, joint, 0.0))
    out = request * COUNT + place
    tl.store(joint_out + out, joint)
    tl.store(decisions_out + out, decision)


@triton.jit
def _kernel(
    drafts,
    target_probs,
    draft_probs,
    seed,
    target_rows,
    candidates,
    anchor_positions,
    joint,
    decisions,
    num_accepted_out,
    next_token_out,
    vocabulary,
    drafts_stride,
    COUNT: tl.constexpr,
    ACCEPT: tl.constexpr,
    NEXT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_VOCABULARY: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    is_draft = index < COUNT
    draft = tl.load(drafts + request * drafts_stride + index, mask=is_draft, other=-1)
    anchor_position = tl.load(anchor_positions + request)
    key = tl.load(seed + request)
    decision = tl.load(decisions + request * COUNT + index, mask=is_draft, other=0.0)
    noise = uniform(key ^ (anchor_position << 32), anchor_position + 1 + index, ACCEPT)
    yes = is_draft & (noise < decision)
    accepted = tl.max(tl.where(yes, index + 1, 0), axis=0)
    dropped = tl.max(tl.where(is_draft & (index == accepted), draft, -1), axis=0)
    scale = tl.load(joint + request * COUNT + accepted - 1, mask=accepted > 0, other=1.0)
    row = request * (COUNT + 1) + accepted
    if target_rows is not None:
        row = tl.load(target_rows + row)
    judged = request * COUNT + tl.minimum(accepted, COUNT - 1)
    tokens = candidates
    if candidates is None:
        draft_row = draft_probs + judged * vocabulary
    else:
        draft_row, tokens = draft_probs + judged * CANDIDATES, candidates + judged * CANDIDATES
    next_token = draw_next(
        target_probs + row * vocabulary,
        draft_row,
        tokens,
        dropped,
        scale.to(tl.float32),
        dropped >= 0,
        uniform(key, anchor_position + 1 + accepted, NEXT),
        vocabulary,
        CANDIDATES,
        BLOCK_VOCABULARY,
    )
    tl.store(num_accepted_out + request, accepted)
    tl.store(next_token_out + request, next_token)


@with_twin
def accept_block(drafts: Tensor, target: Sampled, anchor_positions: Tensor) -> Accepted:
    """Verify B drawn blocks by ``verify_block``; nothing is read back to the host.

    The noise of the decisions is keyed by the anchor's position too (``verify_block`` says why),
    and so must be that of the drafts. More memory than B * K numbers is not needed.

    Args:
        drafts: int64 [B, K], last dimension contiguous; the first below zero ends its block.
        target: what the drafts are judged by; ``draft_probs`` are given.
        anchor_positions: int64 [B], which key the noise.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, count = _check(drafts, target, anchor_positions)
    if batch == 0 or count == 0:
        return accept(drafts, target, anchor_positions)
    accepted = empty_accepted(drafts)
    probs, draft_probs, _, rows, candidates = target
    joint, decisions = torch.empty(
        2, batch, count, dtype=torch.float64, device=drafts.device
    ).unbind()
    num_candidates = 0 if candidates is None else candidates.shape[-1]
    sizes = {
        "COUNT": count,
        "BLOCK": triton.next_power_of_2(count + 1),
        "BLOCK_VOCABULARY": 4096,
        "CANDIDATES": num_candidates,
        "num_warps": 8,
    }
    _decide[(batch, count)](
        drafts,
        probs,
        draft_probs,
        rows,
        candidates,
        joint,
        decisions,
        probs.shape[-1],
        drafts.stride(0),
        BLOCK_CANDIDATES=triton.next_power_of_2(max(1, num_candidates)),
        **sizes,
    )
    _kernel[(batch,)](
        drafts,
        *target,
        anchor_positions,
        joint,
        decisions,
        *accepted,
        probs.shape[-1],
        drafts.stride(0),
        ACCEPT=int(Stream.ACCEPT),
        NEXT=int(Stream.NEXT),
        **sizes,
    )
    return accepted


def _check(drafts: Tensor, target: Sampled, anchor_positions: Tensor) -> tuple[int, int]:
    """B and K."""
    if target.draft_probs is None:
        raise ValueError("draft_probs must be given: accept judges drafts that were chosen")
    return check_sampled(drafts, target, anchor_positions)


def accept_block_naive(drafts: Tensor, target: Sampled, anchor_positions: Tensor) -> Accepted:
    """``accept_block`` in plain torch."""
    _, count = _check(drafts, target, anchor_positions)
    probs, draft_probs = dense(target)
    assert draft_probs is not None
    positions = anchor_positions[:, None] + torch.arange(1, count + 2, device=drafts.device)
    of_block = target.seed ^ (anchor_positions << 32)
    accepted = verify_block(
        drafts,
        probs,
        draft_probs,
        uniforms_naive(of_block, positions[:, :-1], Stream.ACCEPT),
        uniforms_naive(target.seed, positions, Stream.NEXT),
    )
    return accepted._replace(num_accepted=accepted.num_accepted.int())
