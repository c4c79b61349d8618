"""Norm and rotation of queries and keys, in place on a merged projection, in one launch."""

from __future__ import annotations

from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import (
    NormRope,
    Tile,
    check_rotary,
    copy_scaled,
    norm_rotate,
    norm_rotate_naive,
    tiles_each,
    turns,
)
from dflash_plugin.kernels.language import tl, triton


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


@with_twin
def qk_norm_rope(
    qkv: Tensor,
    positions: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    how: NormRope,
    heads: int,
    kv_heads: int,
    *,
    value_scale: float | None = None,
) -> None:
    """Norm and rotate queries and keys of ``qkv`` in place, and scale its values.

    The norm's result is rounded to the tensor's dtype; the rotation is float32 and rounded once.

    Args:
        qkv: float32, bfloat16 or float16 [T, (heads + 2 * kv_heads) * head_dim]; rows may be
            strided.
        positions: int64 [T].
        weights: the norms' of queries and of keys, each [head_dim]; None for no norm.
        how: norm and rotation.
        heads: query heads.
        kv_heads: key heads, and as many value heads.
        value_scale: multiplies the values; None leaves them as they are.

    Raises:
        ValueError: shapes or dtypes do not fit, or the last dimension is not contiguous.
    """
    rows, head_dim = _check(qkv, positions, weights, how, heads, kv_heads)
    if rows == 0:
        return
    query_weight, key_weight = weights or (None, None)
    half = how.inverse_frequencies.numel()
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
        how.inverse_frequencies,
        qkv.stride(0),
        how.eps,
        how.factor,
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
        GEMMA=how.gemma,
        INTERLEAVED=how.interleaved,
        num_warps=tile.warps,
    )


def _check(
    qkv: Tensor,
    positions: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    how: NormRope,
    heads: int,
    kv_heads: int,
) -> tuple[int, int]:
    """Rows and head_dim."""
    rows, width = qkv.shape
    all_heads = heads + 2 * kv_heads
    if width % all_heads or qkv.stride(1) != 1:
        raise ValueError("qkv must be [T, (heads + 2 * kv_heads) * head_dim], contiguous in rows")
    head_dim = width // all_heads
    for weight in weights or ():
        if weight.shape != (head_dim,) or not weight.is_contiguous():
            raise ValueError(f"norm weights must be contiguous [{head_dim}]")
    check_rotary(positions, how.inverse_frequencies, rows, head_dim)
    return rows, head_dim


def qk_norm_rope_naive(
    qkv: Tensor,
    positions: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    how: NormRope,
    heads: int,
    kv_heads: int,
    *,
    value_scale: float | None = None,
) -> None:
    """``qk_norm_rope`` in plain torch."""
    _, head_dim = _check(qkv, positions, weights, how, heads, kv_heads)
    split = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    query, key, value = split
    for part, weight in zip((query, key), weights or (None, None), strict=True):
        part.copy_(norm_rotate_naive(part, positions, weight, how))
    if value_scale is not None:
        value.mul_(value_scale)
