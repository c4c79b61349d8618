"""The walk of a DFlash 2 drafter's selector in one launch, with what tokens were drawn from.

A program scores a position's candidates after every candidate that may come before, and finds what
each of these would be followed by. The last of a block's programs walks: it only looks up one after
the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.decoding.confidence import MAX_CONFIDENCE, MIN_CONFIDENCE
from dflash_plugin.drafter import selector
from dflash_plugin.kernels.common import dot

# Candidates of a position.
MAX_CANDIDATES = 32
# Of the rank, what a program multiplies at a time, and warps that share it.
BLOCK_RANK, WARPS = 256, 4


class Path(NamedTuple):
    """Drafts of a batch of blocks, and what they were taken from.

    Attributes:
        tokens: int64 [B, K].
        scores: float32 [B, K, C], of the candidates after the token before.
        probs: float32 [B, K, C], the distribution that each token was drawn from, all on one where
            the temperature is 0; None where nothing is drawn.
        confidence: float32 [B, K], log-odds of the likeliest candidate, see ``Proposal``.
    """

    tokens: Tensor
    scores: Tensor
    probs: Tensor | None
    confidence: Tensor


@triton.jit
def _best(scores, AXIS: tl.constexpr):
    """The first of the largest; what is no number is none of them."""
    numbers = tl.where(scores == scores, scores, float("-inf"))
    return tl.argmax(numbers, axis=AXIS).to(tl.int32)


@triton.jit
def _softmax(scores, heat, AXIS: tl.constexpr):
    scaled = scores / heat
    weight = tl.exp(scaled - tl.expand_dims(tl.max(scaled, axis=AXIS), AXIS))
    return weight / tl.expand_dims(tl.sum(weight, axis=AXIS), AXIS)


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
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    PRECISION: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARES: tl.constexpr,
    SHARE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    row = request * count + place
    choice = tl.arange(0, BLOCK)
    is_choice = choice < choices
    token = tl.load(candidates + row * choices + choice, mask=is_choice, other=0)
    # Any candidate of the place before the first stands for the anchor.
    anchor = tl.load(anchors + request * anchor_stride)
    follows = choice < tl.where(place > 0, choices, 0)
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
        heat = tl.load(temperature + request)
        if heat > 0:
            probs = _softmax(scores, heat, 1)
            cumulative = tl.cumsum(probs.to(tl.float64), axis=1)
            noise = tl.load(u + row).to(tl.float64)
            threshold = noise * tl.max(cumulative, axis=1)
            drawn = tl.sum((cumulative <= threshold[:, None]).to(tl.int32), axis=1)
            last = tl.max(tl.where(probs > 0, choice[None, :], 0), axis=1)
            following = tl.minimum(drawn, last)
    at = (row * BLOCK + choice[:, None]) * BLOCK + choice[None, :]
    tl.store(all_scores + at, scores)
    tl.store(followers + row * BLOCK + choice, following.to(tl.int8))
    tl.debug_barrier()  # Every warp's stores come before what tells of them.
    if tl.atomic_add(done + request, 1, sem="acq_rel") == count - 1:
        places = tl.arange(0, PLACES)
        is_place = places < count
        rows = request * count + places
        came_from = tl.zeros((PLACES,), dtype=tl.int32)
        index = tl.zeros((), dtype=tl.int32)
        for step in range(count):
            came_from = tl.where(places == step, index, came_from)
            index = tl.load(followers + (request * count + step) * BLOCK + index).to(tl.int32)
        before_at = rows * BLOCK + came_from
        chosen = tl.load(followers + before_at, mask=is_place, other=0).to(tl.int32)
        chosen_token = tl.load(candidates + rows * choices + chosen, mask=is_place, other=0)
        tl.store(tokens_out + rows, chosen_token, mask=is_place)
        realised_at = all_scores + before_at[:, None] * BLOCK + choice[None, :]
        realised = tl.load(realised_at, mask=is_place[:, None], other=0.0)
        out = rows[:, None] * choices + choice[None, :]
        is_out = is_place[:, None] & is_choice[None, :]
        tl.store(scores_out + out, realised, mask=is_out)
        if probs_out is not None:
            share = (choice[None, :] == chosen[:, None]).to(tl.float32)
            if heat > 0:
                share = _softmax(realised, heat, 1)
            tl.store(probs_out + out, share, mask=is_out)
        is_best = choice[None, :] == _best(realised, 1)[:, None]
        others = tl.where(is_best, float("-inf"), realised) - tl.max(realised, axis=1)[:, None]
        odds = -tl.log(tl.sum(tl.exp(others), axis=1))
        odds = tl.minimum(tl.maximum(odds, LEAST), MOST)
        tl.store(confidence_out + rows, odds, mask=is_place)


def select_path(
    candidates: Tensor,
    logits: Tensor,
    gates: Tensor,
    anchors: Tensor,
    predecessors: Tensor,
    successors: Tensor,
    temperature: Tensor | None = None,
    u: Tensor | None = None,
) -> Path:
    """``selector.select_path``, one program a position.

    Args:
        candidates: int64 [B, K, C], contiguous, different token ids of a position; C is at most 32.
        logits: [B, K, C], contiguous, of the candidates, scaled and capped.
        gates: [B, K, R], contiguous, the projected hidden states.
        anchors: int64 [B], the tokens before the first position.
        predecessors: float32, bfloat16 or float16 [V, R], a row for each token that may come
            before; rows may be strided.
        successors: alike, a row for each candidate.
        temperature: float32 [B], rows at 0 take the best; None takes it everywhere.
        u: float32 or float64 [B, K] in [0, 1), contiguous, the noise of draws; goes with
            ``temperature``.

    Raises:
        ValueError: shapes or dtypes do not fit or memory is not laid out so.
    """
    _check(candidates, logits, gates, anchors, predecessors, successors, temperature, u)
    (batch, count, choices), device = candidates.shape, candidates.device
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
        LEAST=MIN_CONFIDENCE,
        MOST=MAX_CONFIDENCE,
        PRECISION="tf32x3",
        PLACES=triton.next_power_of_2(count),
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
) -> None:
    batch, count, choices = candidates.shape
    if candidates.dtype != torch.int64 or not 1 <= choices <= MAX_CANDIDATES or count == 0:
        raise ValueError(
            f"candidates are {candidates.dtype} {list(candidates.shape)}: give int64 [B, K, C], at "
            f"least one position and 1 to {MAX_CANDIDATES} candidates of each"
        )
    if logits.shape != candidates.shape:
        raise ValueError(f"logits must be {list(candidates.shape)}")
    rank = predecessors.shape[1]
    if gates.shape != (batch, count, rank):
        raise ValueError(f"gates must be [{batch}, {count}, {rank}]")
    if not all(part.is_contiguous() for part in (candidates, logits, gates)):
        raise ValueError("candidates, logits and gates must be contiguous")
    if anchors.shape != (batch,) or anchors.dtype != torch.int64:
        raise ValueError(f"anchors must be int64 [{batch}]")
    if successors.shape[1] != rank or predecessors.stride(1) != 1 or successors.stride(1) != 1:
        raise ValueError("predecessors and successors must be [V, R] with contiguous rows")
    if (temperature is None) != (u is None):
        raise ValueError("temperature and u go together")
    if temperature is not None and (
        temperature.shape != (batch,) or temperature.dtype != torch.float32
    ):
        raise ValueError(f"temperature must be float32 [{batch}]")
    if u is not None and (u.shape != (batch, count) or not u.is_contiguous()):
        raise ValueError(f"u must be contiguous [{batch}, {count}]")


def select_path_naive(
    candidates: Tensor,
    logits: Tensor,
    gates: Tensor,
    anchors: Tensor,
    predecessors: Tensor,
    successors: Tensor,
    temperature: Tensor | None = None,
    u: Tensor | None = None,
) -> Path:
    """``select_path`` in plain torch."""
    _check(candidates, logits, gates, anchors, predecessors, successors, temperature, u)
    found = selector.select_path(
        candidates, logits, gates, anchors, predecessors, successors, temperature, u
    )
    return Path(found.tokens, found.scores, found.probs, found.confidence)
