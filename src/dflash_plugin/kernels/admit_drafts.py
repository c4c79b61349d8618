"""Which drafts of all requests are verified: the most promising ones that a budget holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Steps between 0 and 1 by which survival is told apart; more would only take longer.
LEVELS = 4096
# Ranks: survival's steps, and above them one for each place that is verified whatever it promises.
BITS = 13


# Compiled once for every power of two of requests: a server meets all numbers and places of them.
SIZES = ["budget", "requests", "padded"]
PLACES = ["drafts", "others", "admitted", "logit_starts", "query_starts"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PLACES)
def _kernel(
    chances,
    slots,
    drafts,
    others,
    admitted,
    logit_starts,
    query_starts,
    budget,
    requests,
    padded,
    chance_stride,
    BONUS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
):
    request = tl.arange(0, BLOCK_REQUESTS)
    place = tl.arange(0, BLOCK_PLACES)
    lives = request < requests
    slot = tl.load(slots + request, mask=lives, other=0).to(tl.int64)
    count = tl.minimum(tl.load(drafts + request, mask=lives, other=0), MOST)
    is_draft = place[None, :] < count[:, None]
    at = chances + slot[:, None] * chance_stride + place[None, :]
    survival = tl.cumprod(tl.load(at, mask=is_draft, other=0.0), axis=1)
    rank = (survival * (LEVELS - 1) + 0.5).to(tl.int32)
    rank = tl.where(place[None, :] < LEAST, LEVELS + LEAST - place[None, :], rank)
    rank = tl.where(is_draft, rank, -1)
    # The largest rank that at least the budget reach.
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


def admit_drafts(
    chances: Tensor,
    slots: Tensor,
    drafts: Tensor,
    others: Tensor,
    budget: int,
    admitted: Tensor,
    logit_starts: Tensor,
    query_starts: Tensor,
    *,
    bonus: int = 1,
    least: int = 0,
    most: int | None = None,
) -> None:
    """Share a budget out among the drafts of B requests and lay out the batch, in one launch.

    The drafts that survive most probably are admitted, each with those before it; survival is told
    apart to one in 4,096, and of equal ones the first request's go first.

    Args:
        chances: float32 [R, K], that a draft stands if those before it do.
        slots: int64 [B], rows of ``chances``.
        drafts: int32 [B], drafts that a request has.
        others: int32 [B], tokens of a request beside its drafts.
        budget: drafts that are admitted; fewer where there are not so many.
        admitted: int32 [B], takes each request's number.
        logit_starts: int32 [at least B + 1], takes where the rows of each request's logits begin.
        query_starts: int32 [at least B + 1], takes where its tokens begin; the end of the last
            fills the rest.
        bonus: logits of a request beside those of its drafts.
        least: first drafts that go before all others.
        most: first drafts that may be admitted, or None for all.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch = _check(chances, slots, drafts, others, admitted, logit_starts, query_starts)
    places = chances.shape[1]
    _kernel[(1,)](
        chances,
        slots,
        drafts,
        others,
        admitted,
        logit_starts,
        query_starts,
        budget,
        batch,
        query_starts.shape[0],
        chances.stride(0),
        BONUS=bonus,
        LEAST=least,
        MOST=places if most is None else most,
        LEVELS=LEVELS,
        BITS=BITS,
        BLOCK_REQUESTS=triton.next_power_of_2(max(2, batch)),
        BLOCK_PLACES=triton.next_power_of_2(max(2, places)),
        num_warps=4 if batch <= 128 else 16,
    )


def compile_ahead(admit: Callable[..., None], chances: Tensor) -> None:
    """Have ``admit_drafts`` compiled, which is done once for every power of two of requests.

    Args:
        admit: it, with its options.
        chances: float32 [R, K], as it will be called with.
    """
    batch, device = 1, chances.device
    while batch < 2 * len(chances):
        one = torch.ones(batch, dtype=torch.int32, device=device)
        starts = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        slots = torch.zeros(batch, dtype=torch.int64, device=device)
        admit(chances, slots, one, one, 1, one.clone(), starts, starts.clone())
        batch *= 2


def _check(
    chances: Tensor,
    slots: Tensor,
    drafts: Tensor,
    others: Tensor,
    admitted: Tensor,
    logit_starts: Tensor,
    query_starts: Tensor,
) -> int:
    batch = slots.shape[0]
    if chances.dim() != 2 or chances.dtype != torch.float32 or chances.stride(1) != 1:
        raise ValueError("chances must be float32 [R, K] with contiguous rows")
    for name, part in (("drafts", drafts), ("others", others), ("admitted", admitted)):
        if part.shape != (batch,) or part.dtype != torch.int32 or not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 [{batch}]")
    for name, part in (("logit_starts", logit_starts), ("query_starts", query_starts)):
        if part.dim() != 1 or part.shape[0] <= batch or part.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{batch + 1}] or longer")
    return batch


def admit_drafts_naive(
    chances: Tensor,
    slots: Tensor,
    drafts: Tensor,
    others: Tensor,
    budget: int,
    admitted: Tensor,
    logit_starts: Tensor,
    query_starts: Tensor,
    *,
    bonus: int = 1,
    least: int = 0,
    most: int | None = None,
) -> None:
    """``admit_drafts`` in plain torch."""
    batch = _check(chances, slots, drafts, others, admitted, logit_starts, query_starts)
    place = torch.arange(chances.shape[1], device=chances.device)
    count = drafts if most is None else drafts.clamp(max=most)
    is_draft = place < count[:, None]
    survival = torch.where(is_draft, chances[slots], 0.0).cumprod(dim=1)
    rank = (survival * (LEVELS - 1) + 0.5).int()
    rank = torch.where(place < least, LEVELS + least - place.int(), rank)
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
