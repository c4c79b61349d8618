"""Context keys and values of all draft layers, finished and written to their pools in one launch.

This is the KV injection of arXiv 2602.06036, section 4, for an engine's paged cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import (
    DTYPES,
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

POOL_DTYPES = {**DTYPES, torch.float8_e4m3fn: tl.float8e4nv}


@dataclass(frozen=True, eq=False)
class KVPools:
    """The paged key and value pools of every draft layer, made once by ``build``.

    Attributes:
        keys: per layer, [num_slots, kv_heads, head_dim].
        values: per layer, [num_slots, kv_heads, head_dim].
        key_table: int64 [layers], addresses of ``keys``, on their device.
        value_table: int64 [layers], addresses of ``values``.
        scales: float32 [2, layers], divisors of stored keys and values; None divides nothing.
        key_stride: values from one slot of keys to the next.
        value_stride: values from one slot of values to the next.
        alignment: bytes, a power of two up to 16, that divide every address.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    key_table: Tensor
    value_table: Tensor
    scales: Tensor | None
    key_stride: int
    value_stride: int
    alignment: int

    @classmethod
    def build(
        cls,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> KVPools:
        """Pools of all layers, in their order.

        Args:
            keys: per layer, float32, bfloat16, float16 or float8_e4m3fn [num_slots, kv_heads,
                head_dim]. The last two dimensions are contiguous; slots may lie further apart,
                equally far in all layers.
            values: per layer, with the dtype and shape of ``keys``.
            scales: per layer, the divisors of its keys and of its values; None divides nothing.

        Raises:
            ValueError: a pool is not as above.
        """
        if not keys or len(keys) != len(values):
            raise ValueError(f"{len(keys)} key pools and {len(values)} value pools")
        if scales is not None and len(scales) != len(keys):
            raise ValueError(f"{len(scales)} pairs of scales for {len(keys)} layers")
        for name, pools in (("key", keys), ("value", values)):
            for layer, pool in enumerate(pools):
                if fault := _fault(pool, keys[0], pools[0]):
                    raise ValueError(f"{name} pool of layer {layer}: {fault}")
        addresses = [[pool.data_ptr() for pool in pools] for pools in (keys, values)]
        key_table, value_table = torch.tensor(addresses, device=keys[0].device).unbind()
        return cls(
            keys=tuple(keys),
            values=tuple(values),
            key_table=key_table,
            value_table=value_table,
            scales=None
            if scales is None
            else torch.tensor(scales, dtype=torch.float32, device=keys[0].device).T.contiguous(),
            key_stride=keys[0].stride(0),
            value_stride=values[0].stride(0),
            alignment=math.gcd(16, *addresses[0], *addresses[1]),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of every pool."""
        return self.keys[0].dtype


def _fault(pool: Tensor, like: Tensor, first: Tensor) -> str | None:
    if pool.dtype not in POOL_DTYPES:
        return f"dtype {pool.dtype} is none of float32, bfloat16, float16, float8_e4m3fn"
    if pool.dim() != 3 or pool.shape != like.shape:
        return f"shape {list(pool.shape)}, not [num_slots, kv_heads, head_dim] as in layer 0"
    if pool.dtype != like.dtype or pool.device != like.device:
        return f"{pool.dtype} on {pool.device}, but layer 0 has {like.dtype} on {like.device}"
    if not pool[:1].is_contiguous():
        return "a slot's heads are not contiguous"
    if pool.stride(0) != first.stride(0):
        return f"slot stride {pool.stride(0)}, but layer 0 has {first.stride(0)}"
    return None


@triton.jit(do_not_specialize=["each"])
def _kernel(
    kv,
    positions,
    slots,
    key_table,
    value_table,
    key_weights,
    inverse_frequencies,
    committed,
    rows_per_request,
    scales,
    key_stride,
    value_stride,
    eps,
    factor,
    value_scale,
    each,
    POOL: tl.constexpr,
    LIMIT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LAYERS: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    GEMMA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    wanted = slot >= 0
    if committed is not None:
        wanted &= row % rows_per_request < tl.load(committed + row // rows_per_request)
    if wanted:
        cos, sin = turns(tl.load(positions + row), inverse_frequencies, factor, HALF, BLOCK_HALF)
        first = tl.program_id(1) * each
        for tile in range(first, tl.minimum(first + each, LAYERS * HEAD_TILES)):
            layer = tile // HEAD_TILES
            key_pool = tl.load(key_table + layer).to(tl.pointer_type(POOL))
            value_pool = tl.load(value_table + layer).to(tl.pointer_type(POOL))
            # A loaded address carries no alignment, without which stores are one value wide.
            key_pool = tl.multiple_of(key_pool, ALIGNMENT)
            value_pool = tl.multiple_of(value_pool, ALIGNMENT)
            head = (tile % HEAD_TILES) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
            alive = head < KV_HEADS
            source = kv + (row * LAYERS + layer) * (2 * KV_HEADS * HEAD_DIM)
            weight = key_weights
            if key_weights is not None:
                weight = key_weights + layer * HEAD_DIM
            key_divisor = None
            value_divisor = None
            if scales is not None:
                key_divisor = tl.load(scales + layer)
                value_divisor = tl.load(scales + LAYERS + layer)
            norm_rotate(
                source + head * HEAD_DIM,
                key_pool + slot * key_stride + head * HEAD_DIM,
                alive,
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
                key_divisor,
                LIMIT,
            )
            copy_scaled(
                source + (KV_HEADS + head) * HEAD_DIM,
                value_pool + slot * value_stride + head * HEAD_DIM,
                alive,
                value_scale,
                HEAD_DIM,
                BLOCK_HEAD_DIM,
                value_divisor,
                LIMIT,
            )


@with_twin
def inject_kv(
    kv: Tensor,
    positions: Tensor,
    slots: Tensor,
    pools: KVPools,
    key_weights: Tensor | None,
    how: NormRope,
    *,
    committed: Tensor | None = None,
    value_scale: float | None = None,
) -> None:
    """Norm and rotate context keys, scale values, and write both to the pools of all layers.

    The norm's result is rounded to kv's dtype; the rotation is float32 and rounded once, to the
    pools' dtype, after division by the pools' scales; what FP8 cannot hold becomes its largest
    value. Nothing is read back to the host.

    Args:
        kv: float32, bfloat16 or float16 [T, layers, 2, kv_heads, head_dim], contiguous: keys, then
            values of each layer.
        positions: int64 [T].
        slots: int64 [T], each below num_slots (not checked); rows below zero are skipped. Two
            rows written must not share a slot.
        pools: where to write.
        key_weights: [layers, head_dim], or None for no norm.
        how: norm and rotation.
        committed: int32 [B], or None for all. T is then B times the rows of a request, and of each
            request's rows only the first ``committed`` are written.
        value_scale: multiplies the values; None leaves them as they are.

    Raises:
        ValueError: shapes or dtypes do not fit, or a tensor is not contiguous.
    """
    rows, layers, kv_heads, head_dim = kv.shape[0], len(pools.keys), *pools.keys[0].shape[1:]
    if kv.shape != (rows, layers, 2, kv_heads, head_dim) or not kv.is_contiguous():
        raise ValueError(f"kv must be contiguous [T, {layers}, 2, {kv_heads}, {head_dim}]")
    if slots.shape != (rows,) or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous int64 [{rows}]")
    if key_weights is not None and (
        key_weights.shape != (layers, head_dim) or not key_weights.is_contiguous()
    ):
        raise ValueError(f"key_weights must be contiguous [{layers}, {head_dim}]")
    check_rotary(positions, how.inverse_frequencies, rows, head_dim)
    rows_per_request = _rows_per_request(rows, committed)
    if rows == 0:
        return
    half = how.inverse_frequencies.numel()
    tile = Tile.of(kv_heads, head_dim, half)
    head_tiles = triton.cdiv(kv_heads, tile.heads)
    each = tiles_each(rows, layers * head_tiles)
    _kernel[(rows, triton.cdiv(layers * head_tiles, each))](
        kv,
        positions,
        slots,
        pools.key_table,
        pools.value_table,
        key_weights,
        how.inverse_frequencies,
        committed,
        rows_per_request,
        pools.scales,
        pools.key_stride,
        pools.value_stride,
        how.eps,
        how.factor,
        value_scale,
        each,
        POOL=POOL_DTYPES[pools.dtype],
        LIMIT=_limit(pools.dtype),
        ALIGNMENT=pools.alignment,
        LAYERS=layers,
        HEAD_TILES=head_tiles,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_HEADS=tile.heads,
        BLOCK_HEAD_DIM=tile.head_dim,
        BLOCK_HALF=tile.half,
        BLOCK_REST=tile.rest,
        GEMMA=how.gemma,
        INTERLEAVED=how.interleaved,
        num_warps=tile.warps,
    )


def _limit(dtype: torch.dtype) -> float | None:
    """The largest value that FP8 holds, beyond which conversion gives NaN."""
    return torch.finfo(dtype).max if dtype.itemsize == 1 else None


def _rows_per_request(rows: int, committed: Tensor | None) -> int:
    if committed is None:
        return 1
    requests = committed.numel()
    if committed.shape != (requests,) or committed.dtype != torch.int32:
        raise ValueError("committed must be int32 [B]")
    if not committed.is_contiguous() or (rows % requests if requests else rows):
        raise ValueError(f"{rows} rows are no multiple of {requests} requests")
    return rows // requests if requests else 0


def inject_kv_naive(
    kv: Tensor,
    positions: Tensor,
    slots: Tensor,
    pools: KVPools,
    key_weights: Tensor | None,
    how: NormRope,
    *,
    committed: Tensor | None = None,
    value_scale: float | None = None,
) -> None:
    """``inject_kv`` in plain torch; reads slots back to the host."""
    wanted = slots >= 0
    if committed is not None:
        rows = torch.arange(_rows_per_request(kv.shape[0], committed), device=kv.device)
        wanted &= (rows < committed[:, None]).flatten()
    slots, positions = slots[wanted], positions[wanted]
    for layer, (key_pool, value_pool) in enumerate(zip(pools.keys, pools.values, strict=True)):
        key, value = kv[wanted, layer].unbind(1)
        weight = None if key_weights is None else key_weights[layer]
        key = norm_rotate_naive(key, positions, weight, how)
        value = value.float() if value_scale is None else value.float() * value_scale
        if pools.scales is not None:
            key, value = key / pools.scales[0, layer], value / pools.scales[1, layer]
        limit = _limit(pools.dtype)
        if limit is not None:
            key, value = key.clamp(-limit, limit), value.clamp(-limit, limit)
        key_pool[slots] = key.to(key_pool.dtype)
        value_pool[slots] = value.to(value_pool.dtype)
