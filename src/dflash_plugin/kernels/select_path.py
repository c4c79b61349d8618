"""The walk of a DFlash 2 drafter's selector in one launch, with what tokens were drawn from.

Scores after every candidate that may come before are made at once, and what each of them would be
followed by; the walk then only looks up one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin import selector
from dflash_plugin.budget.acceptance import LEAST, MOST
from dflash_plugin.kernels.common import dot

# Scores that a program holds at a time, and candidates of a position, in its registers.
SCORES, MAX_CANDIDATES = 4096, 32
BLOCK_RANK = 32


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
    BLOCK_RANK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    anchor = tl.load(anchors + request * anchor_stride)
    choice = tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_RANK)
    # Of the token before, among its place's candidates; any stands for the anchor.
    index = tl.zeros((), dtype=tl.int32)
    for start in range(0, count, PLACES):
        place = start + tl.arange(0, PLACES)
        is_place = place < count
        row = request * count + place
        at = row[:, None] * choices + choice[None, :]
        is_choice = is_place[:, None] & (choice < choices)[None, :]
        token = tl.load(candidates + at, mask=is_choice, other=0)
        follows = is_choice & (place > 0)[:, None]
        before = tl.load(candidates + at - choices, mask=follows, other=anchor)
        # Of [place, the candidate before, the candidate].
        scores = tl.zeros((PLACES, BLOCK, BLOCK), dtype=tl.float32)
        for deep in range(0, rank, BLOCK_RANK):
            within = deep + depth
            is_deep = within < rank
            gate_at = gates + row[:, None] * rank + within[None, :]
            gate = tl.load(gate_at, mask=is_place[:, None] & is_deep[None, :], other=0.0)
            left_at = predecessors + before[:, :, None] * predecessor_stride + within[None, None, :]
            left = tl.load(left_at, mask=is_deep[None, None, :], other=0.0)
            right_at = successors + token[:, None, :] * successor_stride + within[None, :, None]
            right = tl.load(right_at, mask=is_deep[None, :, None], other=0.0)
            gated = left.to(tl.float32) * gate.to(tl.float32)[:, None, :]
            scores = dot(gated, right.to(tl.float32), scores, PRECISION)
        logit = tl.load(logits + at, mask=is_choice, other=float("-inf"))
        scores += logit.to(tl.float32)[:, None, :]
        following = _best(scores, 2)
        if temperature is not None:
            heat = tl.load(temperature + request)
            if heat > 0:
                probs = _softmax(scores, heat, 2)
                cumulative = tl.cumsum(probs.to(tl.float64), axis=2)
                noise = tl.load(u + row, mask=is_place, other=0.0)
                threshold = noise.to(tl.float64)[:, None] * tl.max(cumulative, axis=2)
                drawn = tl.sum((cumulative <= threshold[:, :, None]).to(tl.int32), axis=2)
                last = tl.max(tl.where(probs > 0, choice[None, None, :], 0), axis=2)
                following = tl.minimum(drawn, last)

        came_from = tl.zeros((PLACES,), dtype=tl.int32)
        for step in range(PLACES):
            here = tl.arange(0, PLACES) == step
            came_from = tl.where(here, index, came_from)
            taken = here[:, None] & (choice == index)[None, :]
            index = tl.sum(tl.sum(tl.where(taken, following, 0), axis=1), axis=0)

        is_before = choice[None, :] == came_from[:, None]
        chosen = tl.sum(tl.where(is_before, following, 0), axis=1)
        is_chosen = choice[None, :] == chosen[:, None]
        realised = tl.sum(tl.where(is_before[:, :, None], scores, 0.0), axis=1)
        tl.store(tokens_out + row, tl.sum(tl.where(is_chosen, token, 0), axis=1), mask=is_place)
        tl.store(scores_out + at, realised, mask=is_choice)
        if probs_out is not None:
            share = is_chosen.to(tl.float32)
            if heat > 0:
                share = _softmax(realised, heat, 1)
            tl.store(probs_out + at, share, mask=is_choice)
        is_best = choice[None, :] == _best(realised, 1)[:, None]
        others = tl.where(is_best, float("-inf"), realised) - tl.max(realised, axis=1)[:, None]
        odds = -tl.log(tl.sum(tl.exp(others), axis=1))
        tl.store(confidence_out + row, tl.minimum(tl.maximum(odds, LEAST), MOST), mask=is_place)


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
    """``selector.select_path``, one program a request.

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
    block = max(16, triton.next_power_of_2(choices))
    if batch > 0:
        _kernel[(batch,)](
            candidates,
            logits,
            gates,
            anchors,
            predecessors,
            successors,
            temperature,
            u,
            *path,
            count,
            choices,
            gates.shape[2],
            anchors.stride(0),
            predecessors.stride(0),
            successors.stride(0),
            LEAST=LEAST,
            MOST=MOST,
            PRECISION="tf32x3",
            PLACES=min(triton.next_power_of_2(count), SCORES // block**2),
            BLOCK=block,
            BLOCK_RANK=BLOCK_RANK,
            num_warps=8,
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
