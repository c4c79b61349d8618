"""Acceptance of whole blocks in one launch: how far, the token after, and what that makes next.

Greedy acceptance compares tokens. Sampled acceptance is ``verify.verify_sampled`` with the noise of
``sampling.uniforms`` made in place; sources are named there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.decoding.sampling import Stream, uniforms
from dflash_plugin.decoding.verify import verify_greedy, verify_sampled
from dflash_plugin.kernels.common import uniform


class Accepted(NamedTuple):
    """What a verify pass commits.

    Attributes:
        num_accepted: int32 [B], drafts that stand.
        committed: int32 [B], rows whose context counts: the anchor and the accepted drafts. As many
            tokens are new, since the token that follows takes the anchor's place.
        tokens: int64 [B, K + 1], accepted drafts, the token that follows, then -1.
        next_token: int64 [B], the next block's anchor.
        next_position: int64 [B], where it stands.
        slots: int64 [B, K + 1], the committed rows' cache slots, the others -1; None where no slots
            were given.
    """

    num_accepted: Tensor
    committed: Tensor
    tokens: Tensor
    next_token: Tensor
    next_position: Tensor
    slots: Tensor | None


class Sampled(NamedTuple):
    """What drawn tokens are judged by.

    Attributes:
        target_probs: float32 [B, K + 1, V], after the anchor and after each draft, contiguous; or
            [N, V], with ``rows``.
        draft_probs: float32 [B, K, V] that the drafts were drawn from, contiguous; None where they
            were chosen.
        seed: int64 [B].
        rows: int64 [B, K + 1], contiguous, which row of ``target_probs`` follows the anchor and
            each draft; drafts that were not verified are below zero. None for a row for each.
    """

    target_probs: Tensor
    draft_probs: Tensor | None
    seed: Tensor
    rows: Tensor | None = None


@triton.jit
def _weight(at, inside, target, draft, excluded, usable, DRAFT_PROBS: tl.constexpr):
    """What tokens are drawn in proportion to: the residual where a draft was rejected."""
    value = tl.load(target + at, mask=inside, other=0.0)
    if DRAFT_PROBS:
        taken = tl.load(draft + at, mask=inside, other=0.0)
        left = tl.maximum(value - taken, 0.0)
    else:
        left = tl.where(at == excluded, 0.0, value)
    return tl.where(usable, left, value)


@triton.jit
def _kernel(
    drafts,
    target_tokens,
    target_probs,
    draft_probs,
    seed,
    target_rows,
    anchor_positions,
    num_drafts,
    slots,
    num_accepted_out,
    committed_out,
    tokens_out,
    next_token_out,
    next_position_out,
    slots_out,
    vocabulary,
    drafts_stride,
    target_stride,
    COUNT: tl.constexpr,
    ACCEPT: tl.constexpr,
    NEXT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_VOCABULARY: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    limit = COUNT
    if num_drafts is not None:
        limit = tl.minimum(tl.load(num_drafts + request).to(tl.int32), COUNT)
    is_draft = place < limit
    draft = tl.load(drafts + request * drafts_stride + place, mask=is_draft, other=-1)
    anchor_position = tl.load(anchor_positions + request)
    if target_tokens is not None:
        own = tl.load(
            target_tokens + request * target_stride + place, mask=place <= COUNT, other=-2
        )
        stands = (draft >= 0) & (draft == own)
        accepted = tl.min(tl.where(stands & is_draft, COUNT, tl.minimum(place, COUNT)), axis=0)
        accepted = tl.minimum(accepted, limit)
        following = tl.load(target_tokens + request * target_stride + accepted)
    else:
        key = tl.load(seed + request)
        index = tl.maximum(draft, 0)
        rows = request * (COUNT + 1) + place
        if target_rows is not None:
            rows = tl.load(target_rows + rows, mask=place <= COUNT, other=0)
        p = tl.load(target_probs + rows * vocabulary + index, mask=is_draft, other=0.0).to(
            tl.float64
        )
        q = p * 0.0 + 1.0
        if draft_probs is not None:
            q = tl.load(
                draft_probs + (request * COUNT + place) * vocabulary + index,
                mask=is_draft,
                other=1.0,
            ).to(tl.float64)
        noise = uniform(key, anchor_position + 1 + place, ACCEPT)
        stands = is_draft & (draft >= 0) & (noise * q < p)
        accepted = tl.min(tl.where(stands, COUNT, tl.minimum(place, COUNT)), axis=0)
        accepted = tl.minimum(accepted, limit)
        # The draft that was rejected, if one was.
        rejected = tl.max(tl.where(is_draft & (place == accepted), draft, -1), axis=0)
        row = request * (COUNT + 1) + accepted
        if target_rows is not None:
            row = tl.load(target_rows + row)
        target_row = target_probs + row * vocabulary
        draft_row = target_row
        if draft_probs is not None:
            draft_row = (
                draft_probs + (request * COUNT + tl.minimum(accepted, COUNT - 1)) * vocabulary
            )
        usable = rejected >= 0
        total = tl.zeros((), dtype=tl.float64)
        left = tl.zeros((), dtype=tl.float64)
        for start in range(0, vocabulary, BLOCK_VOCABULARY):
            at = start + tl.arange(0, BLOCK_VOCABULARY)
            inside = at < vocabulary
            whole = tl.load(target_row + at, mask=inside, other=0.0)
            total += tl.sum(whole.to(tl.float64), axis=0)
            part = _weight(
                at, inside, target_row, draft_row, rejected, usable, draft_probs is not None
            )
            left += tl.sum(part.to(tl.float64), axis=0)
        # Rounding can leave nothing where p and q are equal; then a rejection cannot matter.
        usable = usable & (left > 0)
        total = tl.where(usable, left, total)
        threshold = uniform(key, anchor_position + 1 + accepted, NEXT) * total
        reached = tl.zeros((), dtype=tl.float64)
        found = vocabulary
        last = 0
        for start in range(0, vocabulary, BLOCK_VOCABULARY):
            at = start + tl.arange(0, BLOCK_VOCABULARY)
            part = _weight(
                at,
                at < vocabulary,
                target_row,
                draft_row,
                rejected,
                usable,
                draft_probs is not None,
            ).to(tl.float64)
            cumulative = reached + tl.cumsum(part, axis=0)
            over = (cumulative > threshold) & (part > 0)
            found = tl.minimum(found, tl.min(tl.where(over, at, vocabulary), axis=0))
            last = tl.maximum(last, tl.max(tl.where(part > 0, at, 0), axis=0))
            reached += tl.sum(part, axis=0)
        following = tl.where(found < vocabulary, found, last).to(tl.int64)
    out = request * (COUNT + 1) + place
    token = tl.where(place < accepted, draft, -1)
    token = tl.where(place == accepted, following, token)
    tl.store(tokens_out + out, token, mask=place <= COUNT)
    tl.store(num_accepted_out + request, accepted)
    tl.store(committed_out + request, accepted + 1)
    tl.store(next_token_out + request, following)
    tl.store(next_position_out + request, anchor_position + accepted + 1)
    if slots is not None:
        slot = tl.load(slots + out, mask=place <= COUNT, other=-1)
        tl.store(slots_out + out, tl.where(place <= accepted, slot, -1), mask=place <= COUNT)


def accept(
    drafts: Tensor,
    target: Tensor | Sampled,
    anchor_positions: Tensor,
    *,
    num_drafts: Tensor | None = None,
    slots: Tensor | None = None,
) -> Accepted:
    """Verify B blocks; nothing is read back to the host.

    Args:
        drafts: int64 [B, K], last dimension contiguous; below zero is invalid.
        target: int64 [B, K + 1], the target's argmax after the anchor and after each draft, last
            dimension contiguous; or what drawn tokens are judged by.
        anchor_positions: int64 [B].
        num_drafts: int32 or int64 [B], drafts that count, or None for all K.
        slots: int64 [B, K + 1], contiguous, cache slots of anchor and drafts; or None.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, count = _check(drafts, target, anchor_positions, num_drafts, slots)
    device = drafts.device
    made = Accepted(
        num_accepted=torch.empty(batch, dtype=torch.int32, device=device),
        committed=torch.empty(batch, dtype=torch.int32, device=device),
        tokens=torch.empty(batch, count + 1, dtype=torch.int64, device=device),
        next_token=torch.empty(batch, dtype=torch.int64, device=device),
        next_position=torch.empty(batch, dtype=torch.int64, device=device),
        slots=None if slots is None else torch.empty_like(slots),
    )
    if batch == 0:
        return made
    sampled = target if isinstance(target, Sampled) else None
    if sampled is not None and count == 0:  # What is empty lies nowhere.
        sampled = sampled._replace(draft_probs=None)
    tokens = target if isinstance(target, Tensor) else None
    vocabulary = 0 if sampled is None else sampled.target_probs.shape[-1]
    _kernel[(batch,)](
        drafts,
        tokens,
        *(sampled or (None,) * len(Sampled._fields)),
        anchor_positions,
        num_drafts,
        slots,
        *made,
        vocabulary,
        drafts.stride(0),
        0 if tokens is None else tokens.stride(0),
        COUNT=count,
        ACCEPT=int(Stream.ACCEPT),
        NEXT=int(Stream.NEXT),
        BLOCK=triton.next_power_of_2(count + 1),
        BLOCK_VOCABULARY=4096,
        num_warps=1 if sampled is None else 8,
    )
    return made


def _check(
    drafts: Tensor,
    target: Tensor | Sampled,
    anchor_positions: Tensor,
    num_drafts: Tensor | None,
    slots: Tensor | None,
) -> tuple[int, int]:
    batch, count = drafts.shape
    if drafts.dtype != torch.int64 or (count and drafts.stride(1) != 1):
        raise ValueError("drafts must be int64 [B, K] with a contiguous last dimension")
    if anchor_positions.shape != (batch,) or anchor_positions.dtype != torch.int64:
        raise ValueError(f"anchor_positions must be int64 [{batch}]")
    if num_drafts is not None and num_drafts.shape != (batch,):
        raise ValueError(f"num_drafts must be [{batch}]")
    if slots is not None and (
        slots.shape != (batch, count + 1) or slots.dtype != torch.int64 or not slots.is_contiguous()
    ):
        raise ValueError(f"slots must be contiguous int64 [{batch}, {count + 1}]")
    if isinstance(target, Tensor):
        if (
            target.shape != (batch, count + 1)
            or target.dtype != torch.int64
            or (target.stride(1) != 1)
        ):
            raise ValueError(f"target must be int64 [{batch}, {count + 1}] with contiguous rows")
        return batch, count
    vocabulary = target.target_probs.shape[-1]
    places: tuple[int, ...] = (batch, count + 1)
    wanted = [("target_probs", target.target_probs, places)]
    if target.rows is not None:
        wanted = [("target_probs", target.target_probs, tuple(target.target_probs.shape[:1]))]
        if target.rows.shape != places or target.rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64 {list(places)}")
    if target.draft_probs is not None:
        wanted.append(("draft_probs", target.draft_probs, (batch, count)))
    for name, probs, shape in wanted:
        fits = probs.shape == (*shape, vocabulary) and probs.dtype == torch.float32
        if not fits or not probs.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32 {[*shape, vocabulary]}")
    if target.seed.shape != (batch,) or target.seed.dtype != torch.int64:
        raise ValueError(f"seed must be int64 [{batch}]")
    return batch, count


def accept_naive(
    drafts: Tensor,
    target: Tensor | Sampled,
    anchor_positions: Tensor,
    *,
    num_drafts: Tensor | None = None,
    slots: Tensor | None = None,
) -> Accepted:
    """``accept`` in plain torch, by the core's rules."""
    _, count = _check(drafts, target, anchor_positions, num_drafts, slots)
    limits = None if num_drafts is None else num_drafts.long()
    place = torch.arange(count + 1, device=drafts.device)
    if isinstance(target, Tensor):
        verdict = verify_greedy(drafts, target, limits)
    else:
        places = anchor_positions[:, None] + 1 + place
        probs = target.target_probs
        verdict = verify_sampled(
            drafts,
            probs if target.rows is None else probs[target.rows],
            target.draft_probs,
            uniforms(target.seed, places[:, :-1], Stream.ACCEPT),
            uniforms(target.seed, places, Stream.NEXT),
            limits,
        )
    committed = verdict.num_accepted + 1
    kept = None if slots is None else slots.masked_fill(place >= committed[:, None], -1)
    return Accepted(
        num_accepted=verdict.num_accepted.int(),
        committed=committed.int(),
        tokens=verdict.tokens,
        next_token=verdict.next_token,
        next_position=anchor_positions + committed,
        slots=kept,
    )
