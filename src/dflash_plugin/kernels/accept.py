"""Rejection sampling of whole blocks in one launch, with the noise of ``uniforms``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import uniform
from dflash_plugin.kernels.language import tl, triton
from dflash_plugin.kernels.next_token import draw_next, proposed
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream, uniforms_naive


class Accepted(NamedTuple):
    """What a verify pass commits.

    Attributes:
        num_accepted: int32 [B], accepted drafts.
        next_token: int64 [B], the bonus token or the correction: the next block's anchor.
    """

    num_accepted: Tensor
    next_token: Tensor


class Sampled(NamedTuple):
    """What drafts are judged by.

    Attributes:
        target_probs: float32 [B, K + 1, V], after the anchor and after each draft, contiguous; or
            [N, V], with ``rows``.
        draft_probs: float32 [B, K, V] that the drafts were drawn from, contiguous; or [B, K, C],
            with ``candidates``; None where they were chosen.
        seed: int64 [B], of each request.
        rows: int64 [B, K + 1], contiguous, which row of ``target_probs`` follows the anchor and
            each draft; drafts that were not verified must be below zero. None where
            ``target_probs`` has all rows in order.
        candidates: int64 [B, K, C], contiguous, the tokens that ``draft_probs`` are of; None where
            they are of the whole vocabulary.
    """

    target_probs: Tensor
    draft_probs: Tensor | None
    seed: Tensor
    rows: Tensor | None = None
    candidates: Tensor | None = None


@triton.jit
def _kernel(
    drafts,
    target_probs,
    draft_probs,
    seed,
    target_rows,
    candidates,
    anchor_positions,
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
    BLOCK_CANDIDATES: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    is_draft = index < COUNT
    draft = tl.load(drafts + request * drafts_stride + index, mask=is_draft, other=-1)
    anchor_position = tl.load(anchor_positions + request)
    key = tl.load(seed + request)
    token = tl.maximum(draft, 0)
    rows = request * (COUNT + 1) + index
    if target_rows is not None:
        rows = tl.load(target_rows + rows, mask=index <= COUNT, other=0)
    p_at = target_probs + rows * vocabulary + token
    p = tl.load(p_at, mask=is_draft, other=0.0).to(tl.float64)
    q = p * 0.0 + 1.0
    if draft_probs is not None:
        block_row = request * COUNT + index
        q = proposed(
            draft_probs,
            candidates,
            block_row,
            token,
            is_draft,
            vocabulary,
            CANDIDATES,
            BLOCK_CANDIDATES,
        )
    noise = uniform(key, anchor_position + 1 + index, ACCEPT)
    stands = is_draft & (draft >= 0) & (noise * q < p)
    accepted = tl.min(tl.where(stands, COUNT, tl.minimum(index, COUNT)), axis=0)
    # The draft that was rejected, if one was.
    rejected = tl.max(tl.where(is_draft & (index == accepted), draft, -1), axis=0)
    row = request * (COUNT + 1) + accepted
    if target_rows is not None:
        row = tl.load(target_rows + row)
    target_row = target_probs + row * vocabulary
    draft_row, tokens = draft_probs, candidates
    if draft_probs is not None:
        judged = request * COUNT + tl.minimum(accepted, COUNT - 1)
        if candidates is None:
            draft_row = draft_probs + judged * vocabulary
        else:
            draft_row, tokens = draft_probs + judged * CANDIDATES, candidates + judged * CANDIDATES
    next_token = draw_next(
        target_row,
        draft_row,
        tokens,
        rejected,
        1.0,
        rejected >= 0,
        uniform(key, anchor_position + 1 + accepted, NEXT),
        vocabulary,
        CANDIDATES,
        BLOCK_VOCABULARY,
    )
    tl.store(num_accepted_out + request, accepted)
    tl.store(next_token_out + request, next_token)


@with_twin
def accept(drafts: Tensor, target: Sampled, anchor_positions: Tensor) -> Accepted:
    """Verify B blocks by ``rejection_sample``; nothing is read back to the host.

    Args:
        drafts: int64 [B, K], last dimension contiguous; below zero is invalid.
        target: what the drafts are judged by.
        anchor_positions: int64 [B], which key the noise.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, count = check_sampled(drafts, target, anchor_positions)
    accepted = empty_accepted(drafts)
    if batch == 0:
        return accepted
    if count == 0:  # An empty tensor has no address.
        target = target._replace(draft_probs=None, candidates=None)
    num_candidates = 0 if target.candidates is None else target.candidates.shape[-1]
    _kernel[(batch,)](
        drafts,
        *target,
        anchor_positions,
        *accepted,
        target.target_probs.shape[-1],
        drafts.stride(0),
        COUNT=count,
        ACCEPT=int(Stream.ACCEPT),
        NEXT=int(Stream.NEXT),
        BLOCK=triton.next_power_of_2(count + 1),
        BLOCK_VOCABULARY=4096,
        CANDIDATES=num_candidates,
        BLOCK_CANDIDATES=triton.next_power_of_2(max(1, num_candidates)),
        num_warps=8,
    )
    return accepted


def empty_accepted(drafts: Tensor) -> Accepted:
    """What a launch fills in for drafts [B, K]."""
    batch, device = len(drafts), drafts.device
    return Accepted(
        num_accepted=torch.empty(batch, dtype=torch.int32, device=device),
        next_token=torch.empty(batch, dtype=torch.int64, device=device),
    )


def check_drafts(drafts: Tensor) -> tuple[int, int]:
    """B and K.

    Raises:
        ValueError: not int64 [B, K], or the last dimension is not contiguous.
    """
    batch, count = drafts.shape
    if drafts.dtype != torch.int64 or (count and drafts.stride(1) != 1):
        raise ValueError("drafts must be int64 [B, K] with a contiguous last dimension")
    return batch, count


def check_sampled(drafts: Tensor, target: Sampled, anchor_positions: Tensor) -> tuple[int, int]:
    """B and K.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, count = check_drafts(drafts)
    if anchor_positions.shape != (batch,) or anchor_positions.dtype != torch.int64:
        raise ValueError(f"anchor_positions must be int64 [{batch}]")
    vocabulary = target.target_probs.shape[-1]
    verified: tuple[int, ...] = (batch, count + 1)
    expected = [("target_probs", target.target_probs, verified)]
    if target.rows is not None:
        expected = [("target_probs", target.target_probs, tuple(target.target_probs.shape[:1]))]
        if target.rows.shape != verified or target.rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64 {list(verified)}")
    tokens, width = target.candidates, vocabulary
    if tokens is not None:
        width = tokens.shape[-1]
        is_whole = tokens.shape == (batch, count, width) and tokens.is_contiguous()
        if target.draft_probs is None or not is_whole or tokens.dtype != torch.int64:
            raise ValueError(
                f"candidates must be contiguous int64 {[batch, count, 'C']}, beside draft_probs"
            )
    expected = [(name, probs, (*shape, vocabulary)) for name, probs, shape in expected]
    if target.draft_probs is not None:
        expected.append(("draft_probs", target.draft_probs, (batch, count, width)))
    for name, probs, shape in expected:
        fits = probs.shape == shape and probs.dtype == torch.float32
        if not fits or not probs.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32 {list(shape)}")
    if target.seed.shape != (batch,) or target.seed.dtype != torch.int64:
        raise ValueError(f"seed must be int64 [{batch}]")
    return batch, count


def dense(target: Sampled) -> tuple[Tensor, Tensor | None]:
    """Probabilities [B, K + 1, V] of the target and [B, K, V] or None of the drafter."""
    probs, draft_probs, _, rows, candidates = target
    if draft_probs is not None and candidates is not None:
        spread = draft_probs.new_zeros(*draft_probs.shape[:-1], probs.shape[-1])
        draft_probs = spread.scatter_add_(-1, candidates, draft_probs)
    return probs if rows is None else probs[rows], draft_probs


def accept_naive(drafts: Tensor, target: Sampled, anchor_positions: Tensor) -> Accepted:
    """``accept`` in plain torch."""
    _, count = check_sampled(drafts, target, anchor_positions)
    probs, draft_probs = dense(target)
    positions = anchor_positions[:, None] + torch.arange(1, count + 2, device=drafts.device)
    accepted = rejection_sample(
        drafts,
        probs,
        draft_probs,
        uniforms_naive(target.seed, positions[:, :-1], Stream.ACCEPT),
        uniforms_naive(target.seed, positions, Stream.NEXT),
    )
    return accepted._replace(num_accepted=accepted.num_accepted.int())


def rejection_sample(
    drafts: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    accept_u: Tensor,
    next_u: Tensor,
) -> Accepted:
    """Rejection sampling: what is committed is distributed as the target alone would draw it.

    A draft x is accepted with probability ``min(1, p(x) / q(x))``; at the first rejection the token
    comes from ``max(p - q, 0)``, normalized. Without ``draft_probs`` the drafts were not drawn but
    chosen, q is one on them, and the rule becomes "accept with p(x), else p without x". Source:
    Leviathan et al., arXiv 2211.17192, section 2.3; Chen et al., arXiv 2302.01318, theorem 1.

    Args:
        drafts: int64 [B, K]; below zero is invalid: the token there is drawn from the target.
        target_probs: [B, K + 1, V], after the anchor and after each draft.
        draft_probs: [B, K, V] that the drafts were drawn from, or None.
        accept_u: [B, K] in [0, 1), for the decision on each draft.
        next_u: [B, K + 1] in [0, 1), for the token that follows 0, 1, ... accepted drafts.
    """
    batch, count = drafts.shape
    valid = drafts >= 0
    index = drafts.clamp(min=0)[..., None]
    p = target_probs[:, :-1].gather(-1, index)[..., 0].double()
    q = torch.ones_like(p)
    if draft_probs is not None:
        q = draft_probs.gather(-1, index)[..., 0].double()
    accepted = (valid & (accept_u.double() * q < p)).long().cumprod(dim=1).sum(dim=1)
    request = torch.arange(batch, device=drafts.device)
    target = target_probs[request, accepted]
    residual = target
    if count:
        judged = accepted.clamp(max=count - 1)
        rejected = (accepted < count) & valid[request, judged]
        if draft_probs is None:
            is_draft = (
                torch.arange(target.shape[-1], device=drafts.device) == index[request, judged]
            )
            left = target.masked_fill(is_draft, 0.0)
        else:
            left = (target - draft_probs[request, judged]).clamp(min=0)
        # Rounding can leave nothing where p and q are equal; then a rejection cannot matter.
        usable = rejected & (left.sum(dim=-1) > 0)
        residual = torch.where(usable[:, None], left, target)
    return Accepted(accepted, sample(residual, next_u[request, accepted]))
