"""Which drafts of a batch are verified: the likeliest to be accepted, within a budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.language import tl, triton

# Survival probabilities are compared in this many steps between 0 and 1.
LEVELS = 4096
# Bits of a rank: survival's steps, and above them one rank for each of the first drafts that are
# verified whatever their survival.
BITS = 13


# Compiled once for every power of two of requests: a server meets every batch size and alignment.
SIZES = ["budget", "requests", "padded"]
BUFFERS = ["drafts", "others", "admitted", "logit_starts", "query_starts"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BUFFERS)
def _kernel(
    acceptance,
    slots,
    drafts,
    others,
    admitted,
    logit_starts,
    query_starts,
    budget,
    requests,
    padded,
    acceptance_stride,
    BONUS: tl.constexpr,
    MIN_DRAFTS: tl.constexpr,
    MAX_DRAFTS: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    BLOCK_DRAFTS: tl.constexpr,
):
    request = tl.arange(0, BLOCK_REQUESTS)
    draft = tl.arange(0, BLOCK_DRAFTS)
    lives = request < requests
    slot = tl.load(slots + request, mask=lives, other=0).to(tl.int64)
    count = tl.minimum(tl.load(drafts + request, mask=lives, other=0), MAX_DRAFTS)
    is_draft = draft[None, :] < count[:, None]
    at = acceptance + slot[:, None] * acceptance_stride + draft[None, :]
    survival = tl.cumprod(tl.load(at, mask=is_draft, other=0.0), axis=1)
    rank = (survival * (LEVELS - 1) + 0.5).to(tl.int32)
    rank = tl.where(draft[None, :] < MIN_DRAFTS, LEVELS + MIN_DRAFTS - draft[None, :], rank)
    rank = tl.where(is_draft, rank, -1)
    # The largest rank that at least ``budget`` drafts reach.
    bound = 0
    for bit in tl.static_range(BITS):
        higher = bound + (1 << (BITS - 1 - bit))
        enough = tl.sum((rank >= higher).to(tl.int32)) >= budget
        bound = tl.where(enough, higher, bound)
    above = (rank > bound).to(tl.int32)
    level = (rank == bound).to(tl.int32)
    left = budget - tl.sum(above)
    # Equal ranks in order, so that a request's earlier draft comes first.
    in_row = tl.sum(level, axis=1)
    before = (tl.cumsum(in_row, axis=0) - in_row)[:, None] + tl.cumsum(level, axis=1) - level
    taken = tl.sum(above + level * (before < left).to(tl.int32), axis=1)
    tl.store(admitted + request, taken, mask=lives)
    logits = tl.where(lives, taken + BONUS, 0)
    tl.store(logit_starts + 1 + request, tl.cumsum(logits, axis=0), mask=lives)
    rows = tl.where(lives, taken + tl.load(others + request, mask=lives, other=0), 0)
    tl.store(query_starts + 1 + request, tl.cumsum(rows, axis=0), mask=lives)
    tl.store(logit_starts, 0)
    tl.store(query_starts, 0)
    total = tl.sum(rows)
    for start in range(requests + 1, padded, BLOCK_REQUESTS):
        rest = start + request
        tl.store(query_starts + rest, request * 0 + total, mask=rest < padded)


@with_twin
def admit_drafts(
    acceptance: Tensor,
    slots: Tensor,
    drafts: Tensor,
    others: Tensor,
    budget: int,
    admitted: Tensor,
    logit_starts: Tensor,
    query_starts: Tensor,
    *,
    bonus: int = 1,
    min_drafts: int = 0,
    max_drafts: int | None = None,
) -> None:
    """Share a budget out among the drafts of B requests and lay out the batch, in one launch.

    A draft survives if it and all drafts before it are accepted. The drafts that are likeliest to
    survive are admitted, each with those before it. Survival is compared in steps of 1 / 4,096; of
    equal drafts, those of the first request go first.

    Args:
        acceptance: float32 [R, K], probability that a draft is accepted if those before it are.
        slots: int64 [B], the row of ``acceptance`` of each request.
        drafts: int32 [B], drafts of each request.
        others: int32 [B], tokens of each request that are verified beside its drafts.
        budget: drafts to admit in all; fewer are admitted where fewer exist.
        admitted: int32 [B], output: admitted drafts of each request.
        logit_starts: int32 [at least B + 1], output: the first row of logits of each request.
        query_starts: int32 [at least B + 1], output: the first token of each request; entries
            after B + 1 repeat the end of the last request.
        bonus: rows of logits of a request beside those of its drafts.
        min_drafts: drafts of every request that are admitted before all others.
        max_drafts: drafts of a request that may be admitted, at most; None admits up to K.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch = _check(acceptance, slots, drafts, others, admitted, logit_starts, query_starts)
    count = acceptance.shape[1]
    _kernel[(1,)](
        acceptance,
        slots,
        drafts,
        others,
        admitted,
        logit_starts,
        query_starts,
        budget,
        batch,
        query_starts.shape[0],
        acceptance.stride(0),
        BONUS=bonus,
        MIN_DRAFTS=min_drafts,
        MAX_DRAFTS=count if max_drafts is None else max_drafts,
        LEVELS=LEVELS,
        BITS=BITS,
        BLOCK_REQUESTS=triton.next_power_of_2(max(2, batch)),
        BLOCK_DRAFTS=triton.next_power_of_2(max(2, count)),
        num_warps=4 if batch <= 128 else 16,
    )


def compile_ahead(admit: Callable[..., None], acceptance: Tensor) -> None:
    """Compile ``admit_drafts`` for every power of two of requests, before the first request.

    Args:
        admit: ``admit_drafts``, with the options that it will be called with.
        acceptance: float32 [R, K], the tensor that it will be called with.
    """
    batch, device = 1, acceptance.device
    while batch < 2 * len(acceptance):
        one = torch.ones(batch, dtype=torch.int32, device=device)
        starts = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        slots = torch.zeros(batch, dtype=torch.int64, device=device)
        admit(acceptance, slots, one, one, 1, one.clone(), starts, starts.clone())
        batch *= 2


def _check(
    acceptance: Tensor,
    slots: Tensor,
    drafts: Tensor,
    others: Tensor,
    admitted: Tensor,
    logit_starts: Tensor,
    query_starts: Tensor,
) -> int:
    batch = slots.shape[0]
    if acceptance.dim() != 2 or acceptance.dtype != torch.float32 or acceptance.stride(1) != 1:
        raise ValueError("acceptance must be float32 [R, K] with contiguous rows")
    for name, part in (("drafts", drafts), ("others", others), ("admitted", admitted)):
        if part.shape != (batch,) or part.dtype != torch.int32 or not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 [{batch}]")
    for name, part in (("logit_starts", logit_starts), ("query_starts", query_starts)):
        if part.dim() != 1 or part.shape[0] <= batch or part.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{batch + 1}] or longer")
    return batch


def admit_drafts_naive(
    acceptance: Tensor,
    slots: Tensor,
    drafts: Tensor,
    others: Tensor,
    budget: int,
    admitted: Tensor,
    logit_starts: Tensor,
    query_starts: Tensor,
    *,
    bonus: int = 1,
    min_drafts: int = 0,
    max_drafts: int | None = None,
) -> None:
    """``admit_drafts`` in plain torch."""
    batch = _check(acceptance, slots, drafts, others, admitted, logit_starts, query_starts)
    draft = torch.arange(acceptance.shape[1], device=acceptance.device)
    count = drafts if max_drafts is None else drafts.clamp(max=max_drafts)
    is_draft = draft < count[:, None]
    survival = torch.where(is_draft, acceptance[slots], 0.0).cumprod(dim=1)
    rank = (survival * (LEVELS - 1) + 0.5).int()
    rank = torch.where(draft < min_drafts, LEVELS + min_drafts - draft.int(), rank)
    rank = torch.where(is_draft, rank, -1).flatten()
    order = rank.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(rank)
    chosen[order[:budget]] = 1
    chosen = chosen * (rank >= 0)
    admitted.copy_(chosen.view(batch, -1).sum(dim=1))
    logit_starts[0] = 0
    logit_starts[1 : batch + 1] = (admitted + bonus).cumsum(dim=0)
    query_starts[0] = 0
    query_starts[1 : batch + 1] = (admitted + others).cumsum(dim=0)
    query_starts[batch + 1 :] = query_starts[batch]
