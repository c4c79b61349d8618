"""Norm and rotation of queries and keys, in place on a merged projection, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.kernels.common import (
    Tile,
    check_rotary,
    copy_scaled,
    norm_rotate,
    norm_rotate_naive,
    tiles_each,
    turns,
)


@triton.jit(do_not_specialize=["each"])
def _kernel(
    qkv,
    positions,
    query_weight,
    key_weight,
    inverse_frequencies,
    row_stride,
    eps,
    factor,
    value_scale,
    each,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    GEMMA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_HEADS)[:, None]
    cos, sin = turns(tl.load(positions + row), inverse_frequencies, factor, HALF, BLOCK_HALF)
    first = tl.program_id(1) * each
    for tile in range(first, tl.minimum(first + each, TILES)):
        # A tile never straddles queries and keys: its heads share one weight.
        head = tile * BLOCK_HEADS + lane
        end = HEADS
        weight = query_weight
        if tile >= QUERY_TILES:
            head = HEADS + (tile - QUERY_TILES) * BLOCK_HEADS + lane
            end = HEADS + KV_HEADS
            if key_weight is not None:
                weight = key_weight
        if tile < QUERY_TILES + KEY_TILES:
            heads = qkv + row * row_stride + head * HEAD_DIM
            norm_rotate(
                heads,
                heads,
                head < end,
                cos,
                sin,
                weight,
                eps,
                HEAD_DIM,
                HALF,
                BLOCK_HALF,
                BLOCK_REST,
                GEMMA,
                INTERLEAVED,
            )
        elif value_scale is not None:
            value_head = (tile - QUERY_TILES - KEY_TILES) * BLOCK_HEADS + lane
            values = qkv + row * row_stride + (HEADS + KV_HEADS + value_head) * HEAD_DIM
            alive = value_head < KV_HEADS
            copy_scaled(values, values, alive, value_scale, HEAD_DIM, BLOCK_HEAD_DIM)


def qk_norm_rope(
    qkv: Tensor,
    positions: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    inverse_frequencies: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    *,
    gemma: bool = False,
    interleaved: bool = False,
    factor: float = 1.0,
    value_scale: float | None = None,
) -> None:
    """Norm and rotate queries and keys of ``qkv`` in place, and scale its values.

    The norm's result is rounded to the tensor's dtype; the rotation is float32 and rounded once.

    Args:
        qkv: float32, bfloat16 or float16 [T, (heads + 2 * kv_heads) * head_dim]; rows may be
            strided.
        positions: int64 [T].
        query_weight: [head_dim], or None with ``key_weight`` for no norm.
        key_weight: [head_dim] or None.
        inverse_frequencies: float32 [rotary_dim / 2]; values past ``rotary_dim`` do not turn.
        heads: query heads.
        kv_heads: key heads, and as many value heads.
        head_dim: any size.
        eps: added to the mean square.
        gemma: multiply by ``1 + weight``.
        interleaved: pairs are neighbors, not the two halves.
        factor: on cosines and sines.
        value_scale: on values, or None to leave them.

    Raises:
        ValueError: shapes or dtypes do not fit, or the last dimension is not contiguous.
    """
    rows = qkv.shape[0]
    if qkv.shape != (rows, (heads + 2 * kv_heads) * head_dim) or qkv.stride(1) != 1:
        raise ValueError("qkv must be [T, (heads + 2 * kv_heads) * head_dim], contiguous in rows")
    if (query_weight is None) != (key_weight is None):
        raise ValueError("give both norm weights or neither")
    for weight in (query_weight, key_weight):
        if weight is not None and (weight.shape != (head_dim,) or not weight.is_contiguous()):
            raise ValueError(f"norm weights must be contiguous [{head_dim}]")
    check_rotary(positions, inverse_frequencies, rows, head_dim)
    if rows == 0:
        return
    half = inverse_frequencies.numel()
    tile = Tile.of(max(heads, kv_heads), head_dim, half)
    query_tiles, key_tiles = triton.cdiv(heads, tile.heads), triton.cdiv(kv_heads, tile.heads)
    value_tiles = 0 if value_scale is None else key_tiles
    tiles = query_tiles + key_tiles + value_tiles
    each = tiles_each(rows, tiles)
    _kernel[(rows, triton.cdiv(tiles, each))](
        qkv,
        positions,
        query_weight,
        key_weight,
        inverse_frequencies,
        qkv.stride(0),
        eps,
        factor,
        value_scale,
        each,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        QUERY_TILES=query_tiles,
        KEY_TILES=key_tiles,
        TILES=tiles,
        BLOCK_HEADS=tile.heads,
        BLOCK_HEAD_DIM=tile.head_dim,
        BLOCK_HALF=tile.half,
        BLOCK_REST=tile.rest,
        GEMMA=gemma,
        INTERLEAVED=interleaved,
        num_warps=tile.warps,
    )


def qk_norm_rope_naive(
    qkv: Tensor,
    positions: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    inverse_frequencies: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    *,
    gemma: bool = False,
    interleaved: bool = False,
    factor: float = 1.0,
    value_scale: float | None = None,
) -> None:
    """``qk_norm_rope`` in plain torch."""
    split = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    query, key, value = split
    for part, weight in ((query, query_weight), (key, key_weight)):
        part.copy_(
            norm_rotate_naive(
                part, positions, weight, inverse_frequencies, eps, gemma, interleaved, factor
            )
        )
    if value_scale is not None:
        value.mul_(value_scale)
