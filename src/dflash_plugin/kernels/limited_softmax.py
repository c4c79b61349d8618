"""The distributions that tokens are drawn from, within top-k, top-p and min-p, without a sort.

What the limits keep are the tokens from a threshold on. A row of the vocabulary is read in lanes.
Their largest tokens bound the threshold from below: what these reach alone the row reaches too.
Only tokens from the bound on, few more than are kept, are looked at for the threshold itself. Where
they are too many, as in nearly even distributions, all of the vocabulary is, for one bit of the
threshold after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import most_registers
from dflash_plugin.kernels.language import tl, triton

# Lanes of a row, and tokens above the bound that are looked at without the rest: powers of two.
LANES = 4096


class TokenLimits(NamedTuple):
    """What tokens of B requests are drawn within.

    Attributes:
        top_k: int64 [B], tokens that are kept; 0 is off. Those tied with the last are kept.
        top_p: float32 [B], probability that tokens more probable than a kept one have, at most; 1
            is off.
        min_p: float32 [B], part of the largest probability that a kept token has; 0 is off.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@triton.jit
def _ordered(x):
    """Integers int32 that are ordered as numbers float32 are."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _threshold(keys, weights, wanted):
    """The largest threshold from which on keys weigh as much as wanted; the lowest, if none is."""
    threshold = tl.full((), -2147483648, tl.int64)
    for bit in range(32):
        raised = threshold + (tl.full((), 2147483648, tl.int64) >> bit)
        reached = tl.sum(tl.where(keys >= raised.to(tl.int32), weights, 0.0), axis=0)
        threshold = tl.where(reached >= wanted, raised, threshold)
    return threshold.to(tl.int32)


@triton.jit
def _scaled(row, at, temperature, vocabulary):
    """Logits float32 by the temperature; minus infinity behind the vocabulary."""
    logit = tl.load(row + at, mask=at < vocabulary, other=float("-inf"))
    return logit.to(tl.float32) / temperature


@triton.jit
def _weight_from(
    row, temperature, largest, least, min_p, vocabulary, BY_MASS: tl.constexpr, LANES: tl.constexpr
):
    """What a row's tokens from a key on weigh beside the largest one, or how many they are.

    Those that weigh less than ``min_p`` are left out. Without a vocabulary it is nothing.
    """
    lane = tl.arange(0, LANES)
    weights = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocabulary, LANES):
        at = start + lane
        x = _scaled(row, at, temperature, vocabulary)
        weight = tl.full((LANES,), 1.0, tl.float32)
        if BY_MASS:
            weight = tl.exp(x - largest)
        stays = (at < vocabulary) & (_ordered(x) >= least) & (weight >= min_p)
        weights += tl.where(stays, weight, 0.0)
    return tl.sum(weights, axis=0)


@triton.jit
def _threshold_of_row(
    row,
    temperature,
    largest,
    floor,
    wanted,
    vocabulary,
    bits,
    BY_MASS: tl.constexpr,
    LANES: tl.constexpr,
):
    """As ``_threshold``, of a whole row and its tokens from ``floor`` on; 0 bits find nothing."""
    threshold = tl.full((), -2147483648, tl.int64)
    for bit in range(0, bits):
        raised = threshold + (tl.full((), 2147483648, tl.int64) >> bit)
        least = tl.maximum(raised.to(tl.int32), floor)
        reached = _weight_from(row, temperature, largest, least, 0.0, vocabulary, BY_MASS, LANES)
        threshold = tl.where(reached >= wanted, raised, threshold)
    return threshold.to(tl.int32)


@triton.jit
def _read_lanes(row, temperature, vocabulary, LANES: tl.constexpr):
    """The largest token of each lane, its first place, and what the lane weighs beside it."""
    lane = tl.arange(0, LANES)
    high = tl.full((LANES,), float("-inf"), tl.float32)
    place = tl.full((LANES,), 0, tl.int32)
    mass = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocabulary, LANES):
        x = _scaled(row, start + lane, temperature, vocabulary)
        higher = tl.maximum(high, x)
        # A lane without a finite logit weighs nothing.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(high - base) + tl.exp(x - base)
        place = tl.where(x > high, start + lane, place)
        high = higher
    return high, place, mass


@triton.jit
def _collect(row, above, temperature, bound, vocabulary, LANES: tl.constexpr):
    """Writes the tokens from a bound on one after the other, as many as fit; how many there are."""
    lane = tl.arange(0, LANES)
    found = tl.full((), 0, tl.int32)
    for start in range(0, vocabulary, LANES):
        at = start + lane
        x = _scaled(row, at, temperature, vocabulary)
        taken = ((at < vocabulary) & (_ordered(x) >= bound)).to(tl.int32)
        slot = found + tl.cumsum(taken, axis=0) - 1
        tl.store(above + slot, x, mask=(taken > 0) & (slot < LANES))
        found += tl.sum(taken, axis=0)
    tl.debug_barrier()
    return found


@triton.jit
def _kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    above,
    out,
    vocabulary,
    logits_stride,
    rows_of_request,
    LANES: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    request = index // rows_of_request
    row = logits + index * logits_stride
    lane = tl.arange(0, LANES)
    asked = tl.load(temperatures + index)
    temperature = tl.where(asked == 0, 1.0, asked)
    high, place, mass = _read_lanes(row, temperature, vocabulary, LANES)
    largest = tl.max(high, axis=0)
    first = tl.min(tl.where(high == largest, place, 2147483647), axis=0)
    whole = tl.sum(mass * tl.exp(high - largest), axis=0)
    lowest = tl.full((), -2147483648, tl.int32)
    threshold, kept, min_p = lowest, whole, largest * 0.0
    if top_ks is not None:
        top_k = tl.load(top_ks + request)
        top_p = tl.load(top_ps + request)
        min_p = tl.load(min_ps + request)
        has_k = (top_k > 0) & (top_k < vocabulary)
        has_p = top_p < 1
        keys = _ordered(high)
        count = tl.where(has_k, top_k, 0).to(tl.float32)
        # Top-k goes first, so that it bounds what top-p looks at, too.
        weight = tl.where(has_k, 1.0, tl.exp(high - largest))
        bound = _threshold(keys, weight, tl.where(has_k, count, top_p * whole))
        few_of_row = above + index * LANES
        read = tl.where(has_k | has_p, vocabulary, 0)
        found = _collect(row, few_of_row, temperature, bound, read, LANES)
        are_few = found <= LANES
        x = tl.load(few_of_row + lane, mask=lane < found, other=float("-inf"))
        keys = _ordered(x)
        weight = tl.where(lane < found, tl.exp(x - largest), 0.0)
        # Top-k, and what it leaves.
        of_few = _threshold(keys, tl.where(lane < found, 1.0, 0.0), count)
        bits = tl.where(has_k & (found > LANES), 32, 0)
        of_all = _threshold_of_row(
            row, temperature, largest, lowest, count, vocabulary, bits, False, LANES
        )
        of_few = tl.maximum(of_few, bound)
        threshold = tl.where(has_k, tl.where(are_few, of_few, of_all), lowest)
        left_of_few = tl.sum(tl.where(keys >= threshold, weight, 0.0), axis=0)
        read = tl.where(has_k & (found > LANES), vocabulary, 0)
        left_of_all = _weight_from(row, temperature, largest, threshold, 0.0, read, True, LANES)
        left = tl.where(has_k, tl.where(are_few, left_of_few, left_of_all), whole)
        # Top-p of that.
        of_few = _threshold(keys, tl.where(keys >= threshold, weight, 0.0), top_p * left)
        bits = tl.where(has_p & (found > LANES), 32, 0)
        of_all = _threshold_of_row(
            row, temperature, largest, threshold, top_p * left, vocabulary, bits, True, LANES
        )
        # Rounding can leave the few a little short.
        by_p = tl.where(are_few, tl.maximum(of_few, bound), of_all)
        threshold = tl.where(has_p, tl.maximum(threshold, by_p), threshold)
        # The largest is kept whatever rounding does.
        threshold = tl.minimum(threshold, _ordered(largest))
        # What min-p leaves of that.
        by_few = are_few & (has_k | has_p)
        of_few = tl.sum(tl.where((keys >= threshold) & (weight >= min_p), weight, 0.0), axis=0)
        read = tl.where((has_k | has_p | (min_p > 0)) & (by_few == 0), vocabulary, 0)
        of_all = _weight_from(row, temperature, largest, threshold, min_p, read, True, LANES)
        kept = tl.where(by_few, of_few, tl.where(read > 0, of_all, whole))
    for start in range(0, vocabulary, LANES):
        at = start + lane
        x = _scaled(row, at, temperature, vocabulary)
        beside = tl.exp(x - largest)
        stays = (_ordered(x) >= threshold) & (beside >= min_p)
        value = tl.where(stays, beside / kept, 0.0)
        value = tl.where(asked == 0, tl.where(at == first, 1.0, 0.0), value)
        tl.store(out + index * vocabulary + at, value, mask=at < vocabulary)


@with_twin
def limited_softmax(
    logits: Tensor, temperature: Tensor, limits: TokenLimits | None = None
) -> Tensor:
    """The distributions that tokens are drawn from: temperature, then top-k, top-p and min-p, each
    on what the one before left.

    Args:
        logits: [B, T, V], in any floating dtype.
        temperature: float32 [B, T]; 0 puts all on the first of the largest logits.
        limits: of the B requests; None where no request has any.

    Returns:
        float32 [B, T, V], each row summing to one.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, count, vocabulary = _check(logits, temperature, limits)
    out = torch.empty(batch, count, vocabulary, dtype=torch.float32, device=logits.device)
    if not out.numel():
        return out
    rows = logits.reshape(-1, vocabulary)
    above = None
    if limits is not None:
        above = torch.empty(len(rows), LANES, dtype=torch.float32, device=logits.device)
    _kernel[(len(rows),)](
        rows,
        temperature.contiguous(),
        *(limits or (None, None, None)),
        above,
        out,
        vocabulary,
        rows.stride(0),
        count,
        LANES=LANES,
        num_warps=16,
        # Of 16 warps two blocks fit: a row takes long, and there are more rows than blocks.
        **most_registers(64),
    )
    return out


def _check(logits: Tensor, temperature: Tensor, limits: TokenLimits | None) -> tuple[int, int, int]:
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(f"logits must be [B, T, V] in a floating dtype: {list(logits.shape)}")
    batch, count, vocabulary = logits.shape
    if temperature.shape != (batch, count) or temperature.dtype != torch.float32:
        raise ValueError(f"temperature must be float32 {[batch, count]}")
    dtypes = (torch.int64, torch.float32, torch.float32)
    for name, part, dtype in zip(TokenLimits._fields, limits or (), dtypes, strict=False):
        if part.shape != (batch,) or part.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {[batch]}")
    return batch, count, vocabulary


def limited_softmax_naive(
    logits: Tensor, temperature: Tensor, limits: TokenLimits | None = None
) -> Tensor:
    """``limited_softmax`` in plain torch, by a sort."""
    _, _, vocabulary = _check(logits, temperature, limits)
    greedy = (temperature == 0)[..., None]
    scaled = logits.float() / torch.where(temperature == 0, 1.0, temperature)[..., None]
    if limits is None:
        probs = torch.softmax(scaled, dim=-1)
        best = torch.zeros_like(probs).scatter(-1, scaled.argmax(dim=-1, keepdim=True), 1.0)
        return torch.where(greedy, best, probs)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=logits.device)
    top_k = torch.where(limits.top_k == 0, vocabulary, limits.top_k).clamp(max=vocabulary)
    last = ordered.gather(-1, (top_k - 1)[:, None, None].expand(*ordered.shape[:-1], 1))
    kept = ordered >= last
    probs = torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
    # Of tokens tied with one another the first one's rank.
    differs = torch.ones_like(kept)
    differs[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    start = torch.where(differs, rank, 0).cummax(dim=-1).values
    before = (probs.cumsum(dim=-1) - probs).gather(-1, start)
    top_p = limits.top_p[:, None, None]
    kept = kept & ((before < top_p) | (top_p == 1))
    kept = kept & (probs >= limits.min_p[:, None, None] * probs[..., :1])
    kept = torch.where(greedy, rank == 0, kept | (rank == 0))
    probs = torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
    return torch.zeros_like(probs).scatter(-1, order, probs)
