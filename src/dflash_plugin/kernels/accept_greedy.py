"""Acceptance of drafts that equal the target's likeliest tokens, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.accept import Accepted, check_drafts, empty_accepted
from dflash_plugin.kernels.language import tl, triton


@triton.jit
def _kernel(
    drafts,
    best,
    rows,
    num_accepted_out,
    next_token_out,
    drafts_stride,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    is_draft = index < COUNT
    draft = tl.load(drafts + request * drafts_stride + index, mask=is_draft, other=-1)
    row = tl.load(rows + request * (COUNT + 1) + index, mask=index <= COUNT, other=0)
    token = tl.load(best + row, mask=index <= COUNT, other=-2)
    stands = is_draft & (draft >= 0) & (draft == token)
    accepted = tl.min(tl.where(stands, COUNT, tl.minimum(index, COUNT)), axis=0)
    following = tl.max(tl.where(index == accepted, token, -1), axis=0)
    tl.store(num_accepted_out + request, accepted)
    tl.store(next_token_out + request, following)


@with_twin
def accept_greedy(drafts: Tensor, best: Tensor, rows: Tensor) -> Accepted:
    """Accept the longest run of drafts that are the target's likeliest tokens, of B blocks.

    Args:
        drafts: int64 [B, K], last dimension contiguous; below zero was not verified.
        best: int64 [N], the likeliest token after each verified row.
        rows: int64 [B, K + 1], contiguous, which row follows the anchor and each draft.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, count = _check(drafts, best, rows)
    accepted = empty_accepted(drafts)
    if batch:
        _kernel[(batch,)](
            drafts,
            best,
            rows,
            *accepted,
            drafts.stride(0),
            COUNT=count,
            BLOCK=triton.next_power_of_2(count + 1),
            num_warps=1,
        )
    return accepted


def _check(drafts: Tensor, best: Tensor, rows: Tensor) -> tuple[int, int]:
    batch, count = check_drafts(drafts)
    if best.dim() != 1 or best.dtype != torch.int64 or not best.is_contiguous():
        raise ValueError("best must be contiguous int64 [N]")
    fits = rows.shape == (batch, count + 1) and rows.dtype == torch.int64
    if not fits or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous int64 {[batch, count + 1]}")
    return batch, count


def accept_greedy_naive(drafts: Tensor, best: Tensor, rows: Tensor) -> Accepted:
    """``accept_greedy`` in plain torch."""
    _check(drafts, best, rows)
    tokens = best[rows]
    right = (drafts >= 0) & (drafts == tokens[:, :-1])
    accepted = right.long().cumprod(dim=1).sum(dim=1)
    return Accepted(accepted.int(), tokens.gather(1, accepted[:, None])[:, 0])
