"""The best tokens of rows of logits, for ``draft_head`` and ``best_logits``.

Callers know the maximum and the log-sum-exp of every tile of a row. A first launch finds the tiles
with the largest maxima, segment by segment; a second one looks only into these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels.common import overlap
from dflash_plugin.kernels.language import gdc_launch_dependents, gdc_wait, tl, triton

MAX_TOP_K = 16
# Tiles of a row that one program looks through for the best.
SEGMENT = 128
# A key below that of any score.
NO_KEY = tl.constexpr(-(1 << 63))


class HeadChoice(NamedTuple):
    """The best tokens of each row, best first, and the normalizer of its distribution.

    Attributes:
        tokens: int64 [T, k].
        logits: float32 [T, k], scaled and soft-capped.
        log_sum_exp: float32 [T], over all such logits: log q(token) is logits - log_sum_exp.
    """

    tokens: Tensor
    logits: Tensor
    log_sum_exp: Tensor


@triton.jit
def soft_capped(logits, scale, softcap):
    """``softcap * tanh(scale * logits / softcap)``, float32; a softcap of None only scales."""
    logits = logits * scale
    if softcap is not None:
        # tanh by exponentials of negative numbers, which cannot overflow.
        raised = tl.exp(-2.0 * tl.abs(logits / softcap))
        size = softcap * (1.0 - raised) / (1.0 + raised)
        logits = tl.where(logits < 0, -size, size)
    return logits


@triton.jit
def _ranked(scores, index):
    """Keys int64 that sort as scores float32 do; of equal ones the first is largest."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # No zero is below another.
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _score(keys):
    """The scores of ``_ranked``."""
    order = (keys >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index(keys):
    """The indices of ``_ranked``."""
    return (0xFFFFFFFF - (keys & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _largest(keys, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest keys, in order; one reduction each."""
    rank = tl.arange(0, BLOCK_K)
    best = tl.full((BLOCK_K,), NO_KEY, dtype=tl.int64)
    for step in tl.static_range(TOP_K):
        found = tl.max(keys, axis=0)
        best = tl.where(rank == step, found, best)
        keys = tl.where(keys == found, NO_KEY, keys)
    return best


@triton.jit
def _segment_kernel(
    maxima,
    log_sum_exp,
    keys_out,
    sums_out,
    tiles,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * SEGMENT + tl.arange(0, SEGMENT)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    at = row * tiles + tile
    maximum = tl.load(maxima + at, mask=tile < tiles, other=float("-inf"))
    part = row * tl.num_programs(1) + tl.program_id(1)
    best = _largest(_ranked(maximum, tile), TOP_K, BLOCK_K)
    tl.store(keys_out + part * BLOCK_K + tl.arange(0, BLOCK_K), best)
    sums = tl.load(log_sum_exp + at, mask=tile < tiles, other=float("-inf"))
    top = tl.max(sums, axis=0)
    # A segment may hold nothing but -inf.
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(sums_out + part, base + tl.log(tl.sum(tl.exp(sums - base), axis=0)))


@triton.jit
def _best_kernel(
    logits,
    keys,
    sums,
    tokens_out,
    logits_out,
    log_sum_exp_out,
    vocabulary,
    tiles,
    segments,
    row_stride,
    first_token,
    scale,
    softcap,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        gdc_wait()
    slot = tl.arange(0, BLOCK_SEGMENTS * BLOCK_K)
    filled = segments * BLOCK_K
    key = tl.load(keys + row * filled + slot, mask=slot < filled, other=NO_KEY)
    rank = tl.arange(0, BLOCK_K)
    is_rank = rank < TOP_K
    # The top-k tokens lie in the top-k tiles by maximum: at least k tokens, one of each of these
    # tiles, come before every token of any other tile.
    best_tiles = tl.where(is_rank, _index(_largest(key, TOP_K, BLOCK_K)), tiles)
    token = best_tiles[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    token = tl.reshape(token, (BLOCK_K * COLUMNS,))
    logit = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=float("-inf"))
    best = _largest(_ranked(logit.to(tl.float32), token), TOP_K, BLOCK_K)
    token = tl.minimum(_index(best), vocabulary - 1)
    out = row * TOP_K + rank
    tl.store(tokens_out + out, (token + first_token).to(tl.int64), mask=is_rank)
    tl.store(logits_out + out, soft_capped(_score(best), scale, softcap), mask=is_rank)
    segment = tl.arange(0, BLOCK_SEGMENTS)
    parts_at = sums + row * segments + segment
    parts = tl.load(parts_at, mask=segment < segments, other=float("-inf"))
    top = tl.max(parts, axis=0)
    tl.store(log_sum_exp_out + row, top + tl.log(tl.sum(tl.exp(parts - top), axis=0)))


class Tiles(NamedTuple):
    """Logits of whole rows, and what is known of their tiles.

    Attributes:
        logits: [T, V]; rows may be strided.
        maxima: float32 [T, tiles], the largest logit of each tile.
        log_sum_exp: float32 [T, tiles], over each tile's logits, scaled and soft-capped.
        columns: logits of a tile, a power of two.
    """

    logits: Tensor
    maxima: Tensor
    log_sum_exp: Tensor
    columns: int


def best_of_tiles(
    tiles: Tiles,
    top_k: int,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> HeadChoice:
    """The best tokens of rows whose tiles are known; of equal logits the first.

    Args:
        tiles: the rows.
        top_k: tokens of a row, from 1 to ``MAX_TOP_K``.
        first_token: id of the first column.
        scale: multiplies the logits that are returned.
        softcap: soft-cap of the logits that are returned, or None.
    """
    (rows, count), vocabulary = tiles.maxima.shape, tiles.logits.shape[1]
    device = tiles.logits.device
    best = HeadChoice(
        tokens=torch.empty(rows, top_k, dtype=torch.int64, device=device),
        logits=torch.empty(rows, top_k, dtype=torch.float32, device=device),
        log_sum_exp=torch.empty(rows, dtype=torch.float32, device=device),
    )
    if rows == 0:
        return best
    block_k = triton.next_power_of_2(top_k)
    segment = max(block_k, min(SEGMENT, triton.next_power_of_2(count)))
    segments = triton.cdiv(count, segment)
    keys = torch.empty(rows, segments, block_k, dtype=torch.int64, device=device)
    sums = torch.empty(rows, segments, dtype=torch.float32, device=device)
    overlaps = overlap(device)
    _segment_kernel[rows, segments](
        tiles.maxima,
        tiles.log_sum_exp,
        keys,
        sums,
        count,
        TOP_K=top_k,
        BLOCK_K=block_k,
        SEGMENT=segment,
        OVERLAP=bool(overlaps),
        num_warps=1,
        **overlaps,
    )
    _best_kernel[(rows,)](
        tiles.logits,
        keys,
        sums,
        *best,
        vocabulary,
        count,
        segments,
        tiles.logits.stride(0),
        first_token,
        scale,
        softcap,
        COLUMNS=tiles.columns,
        TOP_K=top_k,
        BLOCK_K=block_k,
        BLOCK_SEGMENTS=triton.next_power_of_2(segments),
        OVERLAP=bool(overlaps),
        num_warps=4,
        **overlaps,
    )
    return best
