"""The walk of a DFlash 2 drafter's selector in one launch, with what tokens were drawn from.

A program scores a position's candidates after every candidate that may come before, and finds what
each of these would be followed by. The last of a block's programs walks: it only looks up one after
the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import dot
from dflash_plugin.kernels.language import tl, triton
from dflash_plugin.kernels.reference import MAX_CONFIDENCE, MIN_CONFIDENCE, confidence, sample

# Candidates of a position.
MAX_CANDIDATES = 32
# Of the rank, what a program multiplies at a time, and warps that share it.
BLOCK_RANK, WARPS = 256, 4


class Path(NamedTuple):
    """Drafts of a batch of blocks, and what they were taken from.

    Attributes:
        tokens: int64 [B, K].
        scores: float32 [B, K, C], of the candidates given the token before.
        probs: float32 [B, K, C], the distribution that each token was drawn from, all on one where
            the temperature is 0; None where nothing is drawn.
        confidence: float32 [B, K], log-odds of the likeliest candidate at temperature 1.
    """

    tokens: Tensor
    scores: Tensor
    probs: Tensor | None
    confidence: Tensor


class Limits(NamedTuple):
    """What of a position's distribution tokens are drawn from.

    Attributes:
        top_k: int64 [B], the k likeliest candidates; 0 for all.
        top_p: float32 [B], candidates until their probability reaches it; 1 for all.
        min_p: float32 [B], candidates at least this share as likely as the likeliest.
        factors: float32 [B, K] from 0 to 1, of the temperature, applied last; 0 takes the best.
            None is 1 everywhere.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    factors: Tensor | None = None


@triton.jit
def _best(scores, AXIS: tl.constexpr):
    """The first of the largest; what is no number is none of them."""
    numbers = tl.where(scores == scores, scores, float("-inf"))
    return tl.argmax(numbers, axis=AXIS).to(tl.int32)


@triton.jit
def _softmax(scores, temperature, AXIS: tl.constexpr):
    scaled = scores / temperature
    weight = tl.exp(scaled - tl.expand_dims(tl.max(scaled, axis=AXIS), AXIS))
    return weight / tl.expand_dims(tl.sum(weight, axis=AXIS), AXIS)


@triton.jit
def _within(scaled, choice, request, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """Scores [R, BLOCK] at the request's temperature, -inf beyond its limits."""
    most = tl.load(top_k + request)
    most = tl.where(most == 0, BLOCK, most)
    share = tl.load(top_p + request)
    share = tl.where(share == 1.0, 2.0, share)  # Off: rounding may reach one early.
    least = tl.load(min_p + request)
    within = scaled
    # In a captured pass every request has limits, and most are off.
    if (most < BLOCK) | (share <= 1.0) | (least > 0.0):
        rank = tl.zeros(scaled.shape, dtype=tl.int32)
        for other in range(BLOCK):
            score = tl.sum(tl.where(choice[None, :] == other, scaled, 0.0), axis=1)[:, None]
            is_before = (score > scaled) | ((score == scaled) & (choice[None, :] > other))
            rank += is_before.to(tl.int32)
        kept = rank < most
        probs = _softmax(tl.where(kept, scaled, float("-inf")), 1.0, 1)
        before = tl.zeros(scaled.shape, dtype=tl.float32)
        for other in range(BLOCK):
            here = choice[None, :] == other
            place = tl.sum(tl.where(here, rank, 0), axis=1)[:, None]
            chance = tl.sum(tl.where(here, probs, 0.0), axis=1)[:, None]
            before += tl.where(place < rank, chance, 0.0)
        kept = kept & (before < share) & (probs >= least * tl.max(probs, axis=1)[:, None])
        within = tl.where(kept | (rank == 0), scaled, float("-inf"))
    return within


@triton.jit
def _kernel(
    candidates,
    logits,
    gates,
    anchors,
    predecessors,
    successors,
    temperature,
    u,
    top_k,
    top_p,
    min_p,
    factors,
    tokens_out,
    scores_out,
    probs_out,
    confidence_out,
    all_scores,
    followers,
    done,
    count,
    choices,
    rank,
    anchor_stride,
    predecessor_stride,
    successor_stride,
    MIN_CONFIDENCE: tl.constexpr,
    MAX_CONFIDENCE: tl.constexpr,
    PRECISION: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARES: tl.constexpr,
    SHARE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    row = request * count + step
    choice = tl.arange(0, BLOCK)
    is_choice = choice < choices
    token = tl.load(candidates + row * choices + choice, mask=is_choice, other=0)
    # Before the first position, every candidate stands for the anchor.
    anchor = tl.load(anchors + request * anchor_stride)
    follows = choice < tl.where(step > 0, choices, 0)
    before = tl.load(candidates + (row - 1) * choices + choice, mask=follows, other=anchor)
    # Of [a warp's share of the rank, the candidate before, the candidate].
    parts = tl.zeros((SHARES, BLOCK, BLOCK), dtype=tl.float32)
    depth = tl.arange(0, SHARES)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    for start in range(0, rank, SHARES * SHARE):
        deep = start + depth
        gate = tl.load(gates + row * rank + deep, mask=deep < rank, other=0.0)
        left_at = predecessors + before[None, :, None] * predecessor_stride + deep[:, None, :]
        left = tl.load(left_at, mask=(deep < rank)[:, None, :], other=0.0)
        right_at = successors + token[None, None, :] * successor_stride + deep[:, :, None]
        right = tl.load(right_at, mask=(deep < rank)[:, :, None], other=0.0)
        gated = left.to(tl.float32) * gate.to(tl.float32)[:, None, :]
        parts = dot(gated, right.to(tl.float32), parts, PRECISION)
    logit = tl.load(logits + row * choices + choice, mask=is_choice, other=float("-inf"))
    scores = tl.sum(parts, axis=0) + logit.to(tl.float32)[None, :]
    following = _best(scores, 1)
    if temperature is not None:
        request_temperature = tl.load(temperature + request)
        factor = 1.0
        if factors is not None:
            factor = tl.load(factors + row)
        if (request_temperature > 0) & (factor > 0):
            scaled = scores / request_temperature
            if top_k is not None:
                scaled = _within(scaled, choice, request, top_k, top_p, min_p, BLOCK)
            probs = _softmax(scaled, factor, 1)
            cumulative = tl.cumsum(probs.to(tl.float64), axis=1)
            noise = tl.load(u + row).to(tl.float64)
            threshold = noise * tl.max(cumulative, axis=1)
            drawn = tl.sum((cumulative <= threshold[:, None]).to(tl.int32), axis=1)
            last = tl.max(tl.where(probs > 0, choice[None, :], 0), axis=1)
            following = tl.minimum(drawn, last)
    pair = (row * BLOCK + choice[:, None]) * BLOCK + choice[None, :]
    tl.store(all_scores + pair, scores)
    tl.store(followers + row * BLOCK + choice, following.to(tl.int8))
    tl.debug_barrier()  # Every warp's stores come before what tells of them.
    if tl.atomic_add(done + request, 1, sem="acq_rel") == count - 1:
        position = tl.arange(0, POSITIONS)
        is_position = position < count
        rows = request * count + position
        came_from = tl.zeros((POSITIONS,), dtype=tl.int32)
        index = tl.zeros((), dtype=tl.int32)
        for at in range(count):
            came_from = tl.where(position == at, index, came_from)
            index = tl.load(followers + (request * count + at) * BLOCK + index).to(tl.int32)
        before_at = rows * BLOCK + came_from
        chosen = tl.load(followers + before_at, mask=is_position, other=0).to(tl.int32)
        chosen_token = tl.load(candidates + rows * choices + chosen, mask=is_position, other=0)
        tl.store(tokens_out + rows, chosen_token, mask=is_position)
        realized_at = all_scores + before_at[:, None] * BLOCK + choice[None, :]
        realized = tl.load(realized_at, mask=is_position[:, None], other=0.0)
        out = rows[:, None] * choices + choice[None, :]
        is_out = is_position[:, None] & is_choice[None, :]
        tl.store(scores_out + out, realized, mask=is_out)
        if probs_out is not None:
            share = (choice[None, :] == chosen[:, None]).to(tl.float32)
            if request_temperature > 0:
                scaled = realized / request_temperature
                if top_k is not None:
                    scaled = _within(scaled, choice, request, top_k, top_p, min_p, BLOCK)
                if factors is None:
                    share = _softmax(scaled, 1.0, 1)
                else:
                    parts_of = tl.load(factors + rows, mask=is_position, other=1.0)[:, None]
                    drawn_from = _softmax(scaled, tl.where(parts_of > 0, parts_of, 1.0), 1)
                    share = tl.where(parts_of > 0, drawn_from, share)
            tl.store(probs_out + out, share, mask=is_out)
        is_best = choice[None, :] == _best(realized, 1)[:, None]
        others = tl.where(is_best, float("-inf"), realized) - tl.max(realized, axis=1)[:, None]
        odds = -tl.log(tl.sum(tl.exp(others), axis=1))
        odds = tl.minimum(tl.maximum(odds, MIN_CONFIDENCE), MAX_CONFIDENCE)
        tl.store(confidence_out + rows, odds, mask=is_position)


@with_twin
def select_path(
    candidates: Tensor,
    logits: Tensor,
    gates: Tensor,
    anchors: Tensor,
    predecessors: Tensor,
    successors: Tensor,
    temperature: Tensor | None = None,
    u: Tensor | None = None,
    limits: Limits | None = None,
) -> Path:
    """Walk each block from its anchor, taking or drawing one candidate a position.

    The score of a candidate c after token p at position t is ``logit[t, c] + <A[p] * gate[t],
    B[c]>`` with codebooks A and B. Scores and probabilities are float32. Drawing is by inverse CDF
    in the candidates' order. Source: ``CandidateSelector`` of PyPI dflash 0.1.0.

    Args:
        candidates: int64 [B, K, C], contiguous, different token ids of a position. The kernel takes
            at most ``MAX_CANDIDATES``, the twin any number.
        logits: [B, K, C], contiguous, of the candidates, scaled and capped.
        gates: [B, K, R], contiguous, the projected hidden states.
        anchors: int64 [B], the tokens before the first position.
        predecessors: float32, bfloat16 or float16 [V, R], a row for each token that may come
            before; rows may be strided.
        successors: [V, R], a row for each candidate; rows may be strided.
        temperature: float32 [B], rows at 0 take the best; None takes it everywhere.
        u: float32 or float64 [B, K] in [0, 1), contiguous, the noise of draws; goes with
            ``temperature``.
        limits: of what is drawn from; goes with ``temperature``. None draws from all candidates.

    Raises:
        ValueError: shapes, dtypes or, for the kernel, strides do not fit.
    """
    (batch, count, choices), device = candidates.shape, candidates.device
    if choices > MAX_CANDIDATES:
        raise ValueError(f"{choices} candidates: the kernel takes 1 to {MAX_CANDIDATES} candidates")
    _check(candidates, logits, gates, anchors, predecessors, successors, temperature, u, limits)
    if not all(part.is_contiguous() for part in (candidates, logits, gates)):
        raise ValueError("candidates, logits and gates must be contiguous")
    if predecessors.stride(1) != 1 or successors.stride(1) != 1:
        raise ValueError("predecessors and successors must have contiguous rows")
    if u is not None and not u.is_contiguous():
        raise ValueError("u must be contiguous")
    scores = torch.empty(candidates.shape, dtype=torch.float32, device=device)
    path = Path(
        tokens=torch.empty(batch, count, dtype=torch.int64, device=device),
        scores=scores,
        probs=None if temperature is None else torch.empty_like(scores),
        confidence=torch.empty(batch, count, dtype=torch.float32, device=device),
    )
    if batch == 0:
        return path
    block = max(16, triton.next_power_of_2(choices))
    whole = min(BLOCK_RANK, max(16, triton.next_power_of_2(gates.shape[2])))
    share = max(16, whole // WARPS)
    _kernel[batch, count](
        candidates,
        logits,
        gates,
        anchors,
        predecessors,
        successors,
        temperature,
        u,
        *(limits or (None, None, None, None)),
        *path,
        torch.empty(batch, count, block, block, dtype=torch.float32, device=device),
        torch.empty(batch, count, block, dtype=torch.int8, device=device),
        torch.zeros(batch, dtype=torch.int32, device=device),
        count,
        choices,
        gates.shape[2],
        anchors.stride(0),
        predecessors.stride(0),
        successors.stride(0),
        MIN_CONFIDENCE=MIN_CONFIDENCE,
        MAX_CONFIDENCE=MAX_CONFIDENCE,
        PRECISION="tf32x3",
        POSITIONS=triton.next_power_of_2(count),
        BLOCK=block,
        SHARES=whole // share,
        SHARE=share,
        num_warps=WARPS,
    )
    return path


def _check(
    candidates: Tensor,
    logits: Tensor,
    gates: Tensor,
    anchors: Tensor,
    predecessors: Tensor,
    successors: Tensor,
    temperature: Tensor | None,
    u: Tensor | None,
    limits: Limits | None,
) -> None:
    batch, count, choices = candidates.shape
    if candidates.dtype != torch.int64 or choices == 0 or count == 0:
        raise ValueError(
            f"candidates are {candidates.dtype} {list(candidates.shape)}: give int64 [B, K, C], at "
            "least one position and one candidate of each"
        )
    if logits.shape != candidates.shape:
        raise ValueError(f"logits must be {list(candidates.shape)}")
    rank = predecessors.shape[1]
    if gates.shape != (batch, count, rank):
        raise ValueError(f"gates must be [{batch}, {count}, {rank}]")
    if anchors.shape != (batch,) or anchors.dtype != torch.int64:
        raise ValueError(f"anchors must be int64 [{batch}]")
    if successors.shape[1] != rank:
        raise ValueError("predecessors and successors must be [V, R]")
    if (temperature is None) != (u is None):
        raise ValueError("temperature and u go together")
    if temperature is not None and (
        temperature.shape != (batch,) or temperature.dtype != torch.float32
    ):
        raise ValueError(f"temperature must be float32 [{batch}]")
    if u is not None and u.shape != (batch, count):
        raise ValueError(f"u must be [{batch}, {count}]")
    if limits is not None:
        of_requests = (limits.top_k, limits.top_p, limits.min_p)
        if temperature is None or any(part.shape != (batch,) for part in of_requests):
            raise ValueError(f"limits must be [{batch}], beside temperature")
        factors = limits.factors
        if factors is not None and (factors.shape != (batch, count) or not factors.is_contiguous()):
            raise ValueError(f"factors must be contiguous [{batch}, {count}]")


def select_path_naive(
    candidates: Tensor,
    logits: Tensor,
    gates: Tensor,
    anchors: Tensor,
    predecessors: Tensor,
    successors: Tensor,
    temperature: Tensor | None = None,
    u: Tensor | None = None,
    limits: Limits | None = None,
) -> Path:
    """``select_path`` in plain torch."""
    _check(candidates, logits, gates, anchors, predecessors, successors, temperature, u, limits)
    rows = successors[candidates].float()
    previous = anchors
    tokens: list[Tensor] = []
    scores: list[Tensor] = []
    probs: list[Tensor] = []
    for step in range(candidates.shape[1]):
        scores.append(
            candidate_scores(logits[:, step], gates[:, step], predecessors[previous], rows[:, step])
        )
        if temperature is None or u is None:
            chosen = scores[-1].argmax(dim=-1)
        else:
            probs.append(_distribution(scores[-1], temperature, limits, step))
            chosen = sample(probs[-1], u[:, step])
        previous = candidates[:, step].gather(-1, chosen[:, None])[:, 0]
        tokens.append(previous)
    drawn_from = torch.stack(probs, dim=1) if probs else None
    all_scores = torch.stack(scores, dim=1)
    return Path(torch.stack(tokens, dim=1), all_scores, drawn_from, confidence(all_scores))


def candidate_scores(logits: Tensor, gates: Tensor, before: Tensor, rows: Tensor) -> Tensor:
    """``logits + <before * gates, rows>``, float32 [..., C].

    Args:
        logits: [..., C], of the candidates, scaled and capped.
        gates: [..., R], the projected hidden states.
        before: [..., R], codebook rows of the tokens before.
        rows: [..., C, R], codebook rows of the candidates.
    """
    context = before.float() * gates.float()
    return logits.float() + torch.einsum("...r,...cr->...c", context, rows.float())


def _distribution(scores: Tensor, temperature: Tensor, limits: Limits | None, step: int) -> Tensor:
    """Probabilities [B, C] of scores [B, C]; all on the best where the temperature [B] is 0."""
    factor = torch.ones_like(temperature)
    if limits is not None and limits.factors is not None:
        factor = limits.factors[:, step]
    is_greedy = ((temperature == 0) | (factor == 0))[:, None]
    best = torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    scaled = scores / torch.where(temperature == 0, 1.0, temperature)[:, None]
    if limits is not None:
        scaled = scaled.masked_fill(~_kept(scaled, limits), float("-inf"))
    sharper = scaled / torch.where(factor == 0, 1.0, factor)[:, None]
    return torch.where(is_greedy, best, torch.softmax(sharper, dim=-1))


def _kept(scores: Tensor, limits: Limits) -> Tensor:
    """Candidates bool [B, C] of scores [B, C] within the limits."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    top_k = torch.where(limits.top_k == 0, scores.shape[-1], limits.top_k)
    kept = rank < top_k[:, None]
    probs = torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
    before = probs.cumsum(dim=-1) - probs
    kept = kept & ((before < limits.top_p[:, None]) | (limits.top_p == 1)[:, None])
    kept = kept & (probs >= limits.min_p[:, None] * probs[:, :1])
    return torch.zeros_like(kept).scatter(-1, order, kept | (rank == 0))
