"""Attention of blocks, drafted or verified, over a paged context and each block's own rows.

One program takes all query heads that share a key head, so that keys and values are read once. With
few requests the context is cut into parts that run as programs of their own beside the block's own
rows, so that a long one does not leave most of a GPU idle; a second launch joins them all (Dao et
al., "Flash-Decoding for long-context inference", 2023).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import DTYPES, PROGRAMS, dot, dot_precision, stages_that_fit
from dflash_plugin.kernels.language import tl, triton

INTEGERS = (torch.int32, torch.int64)
# Query rows that share a key head, which one program holds.
MAX_ROWS = 256
# Parts that the second launch loads at a time, and its warps.
JOINED_AT_ONCE, JOIN_WARPS = 8, 1


class PagedContext(NamedTuple):
    """Where one layer's context keys and values lie.

    Attributes:
        keys: [num_slots, kv_heads, head_dim], last two dimensions contiguous.
        values: [num_slots, kv_heads, head_dim], last two dimensions contiguous.
        slot_table: int32 or int64 [R, positions], the slot of each position of each request.
        lengths: int32 or int64 [B], context positions of each request, which is its anchor's
            position.
        requests: int32 or int64 [B], rows of ``slot_table``, or None for the first B.
    """

    keys: Tensor
    values: Tensor
    slot_table: Tensor
    lengths: Tensor
    requests: Tensor | None = None


class Blocks(NamedTuple):
    """Blocks of different lengths, one behind the other.

    Attributes:
        starts: int32 [B + 1], contiguous, the first row of each block, and the end of the last.
        requests: int32 [N], contiguous, the block of each row, from 0 to B - 1.
        max_rows: rows of the longest possible block.
    """

    starts: Tensor
    requests: Tensor
    max_rows: int


class AttentionTile(NamedTuple):
    """How a context is worked on: keys of a step, warps, loads in flight and parts.

    With one part, its program takes the block's own rows too.
    """

    keys: int
    warps: int
    stages: int
    parts: int


@triton.jit
def _extent(request, lengths, window, parts, BLOCK_KEYS: tl.constexpr):
    """Of a request's context: its length, the first position seen, and steps a part takes."""
    length = tl.load(lengths + request).to(tl.int64)
    first = length * 0
    if window is not None:
        # The anchor's own row sees furthest back, and no further than this.
        first = tl.maximum(first, length - window)
    return length, first, tl.cdiv(tl.cdiv(length - first, BLOCK_KEYS), parts)


@triton.jit
def _rows_of(request, block_starts, ROWS: tl.constexpr):
    """Where a request's rows begin, and how many they are."""
    begin, count = request * ROWS, ROWS
    if block_starts is not None:
        first = tl.load(block_starts + request)
        begin, count = first.to(tl.int64), tl.load(block_starts + request + 1) - first
    return begin, count


@triton.jit
def _fold(query, key, value, visible, best, total, out, scale, PRECISION: tl.constexpr):
    """Take one tile of keys [N, D] into the running softmax of queries [M, D]."""
    scores = dot(query, tl.trans(key), tl.zeros(visible.shape, dtype=tl.float32), PRECISION)
    scores = tl.where(visible, scores * scale, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, axis=1))
    # Rows that have seen nothing yet keep weights of zero.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - base[:, None])
    shrink = tl.exp(best - base)
    total = total * shrink + tl.sum(weights, axis=1)
    out = dot(weights.to(value.dtype), value, out * shrink[:, None], PRECISION)
    return highest, total, out


# Compiled once for any number of requests: a server meets all of them.
@triton.jit(do_not_specialize=["total_rows"])
def _part_kernel(
    query,
    key,
    value,
    keys,
    values,
    slot_table,
    lengths,
    requests,
    sinks,
    own_slots,
    block_starts,
    out_values,
    part_out,
    part_best,
    part_total,
    total_rows,
    query_stride,
    key_stride,
    value_stride,
    keys_stride,
    values_stride,
    table_stride,
    scale,
    window,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    # Requests that pad a captured pass have no rows.
    if block_starts is not None:  # noqa: SIM102
        if tl.load(block_starts + request) == tl.load(block_starts + request + 1):
            return
    # Of several programs, the first takes the block's own rows and the others parts of the context.
    others = tl.maximum(1, tl.num_programs(2) - 1)
    length, first, share = _extent(request, lengths, window, others, BLOCK_KEYS)
    tiles = tl.cdiv(length - first, BLOCK_KEYS)
    if WHOLE:
        tile_from, tile_to = tiles * 0, tiles
    else:
        tile_from = tl.maximum(0, part - 1) * share
        tile_to = tl.where(part == 0, 0, tl.minimum(tiles, tile_from + share))
        if part > 0 and tile_from >= tiles:
            return
    # Rows of all query heads that share a key head, head by head.
    folded = tl.arange(0, BLOCK_ROWS)
    row = folded % ROWS
    head = kv_head * GROUP + folded // ROWS
    is_row = folded < ROWS * GROUP
    begin, count = _rows_of(request, block_starts, ROWS)
    depth = tl.arange(0, BLOCK_DIM)
    is_depth = depth < HEAD_DIM
    queries = tl.load(
        query + (begin + row)[:, None] * query_stride + head[:, None] * HEAD_DIM + depth[None, :],
        mask=(is_row & (row < count))[:, None] & is_depth[None, :],
        other=0.0,
    )
    best = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    out = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype=tl.float32)

    table_row = request
    if requests is not None:
        table_row = tl.load(requests + request).to(tl.int64)
    table = slot_table + table_row * table_stride
    for tile in range(tile_from, tile_to):
        at = first + tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        inside = at < length
        slot = tl.load(table + at, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & is_depth[None, :]
        offset = kv_head * HEAD_DIM + depth[None, :]
        k = tl.load(keys + slot[:, None] * keys_stride + offset, mask=mask, other=0.0)
        v = tl.load(values + slot[:, None] * values_stride + offset, mask=mask, other=0.0)
        visible = inside[None, :] & is_row[:, None]
        if window is not None:
            visible &= (length + row)[:, None] - at[None, :] < window
        best, total, out = _fold(
            queries,
            k.to(queries.dtype),
            v.to(queries.dtype),
            visible,
            best,
            total,
            out,
            scale,
            PRECISION,
        )
    if part == 0:
        own = tl.arange(0, BLOCK_OWN)
        is_own = own < count
        mask = is_own[:, None] & is_depth[None, :]
        offset = kv_head * HEAD_DIM + depth[None, :]
        at_row = (begin + own)[:, None]
        k = tl.load(key + at_row * key_stride + offset, mask=mask, other=0.0)
        v = tl.load(value + at_row * value_stride + offset, mask=mask, other=0.0)
        if own_slots is not None:
            slot = tl.load(own_slots + begin + own, mask=is_own, other=0)[:, None]
            tl.store(keys + slot * keys_stride + offset, k, mask=mask)
            tl.store(values + slot * values_stride + offset, v, mask=mask)
        visible = is_own[None, :] & is_row[:, None]
        distance = row[:, None] - own[None, :]
        if CAUSAL:
            visible &= distance >= 0
        if window is not None:
            visible &= tl.abs(distance) < window
        best, total, out = _fold(queries, k, v, visible, best, total, out, scale, PRECISION)
    # Until here rows behind a block's last are carried along, which takes fewer registers, as does
    # looking again.
    begin, count = _rows_of(request, block_starts, ROWS)
    is_row &= row < count
    index = (part * total_rows + begin + row) * HEADS + head
    at = index[:, None] * HEAD_DIM + depth[None, :]
    mask = is_row[:, None] & is_depth[None, :]
    if WHOLE:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=is_row, other=0.0)
            highest = tl.maximum(best, sink)
            shrink = tl.exp(best - highest)
            total = total * shrink + tl.exp(sink - highest)
            out = out * shrink[:, None]
        tl.store(out_values + at, out / total[:, None], mask=mask)
    else:
        tl.store(part_best + index, best, mask=is_row)
        tl.store(part_total + index, total, mask=is_row)
        tl.store(part_out + at, out, mask=mask)


@triton.jit(do_not_specialize=["parts", "rows"])
def _join_kernel(
    part_out,
    part_best,
    part_total,
    sinks,
    lengths,
    row_requests,
    out,
    parts,
    rows,
    window,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One row of one head.
    index = tl.program_id(0).to(tl.int64)
    request = index // (ROWS * HEADS)
    if row_requests is not None:
        request = tl.load(row_requests + index // HEADS).to(tl.int64)
    length, first, share = _extent(request, lengths, window, parts - 1, BLOCK_KEYS)
    # The first holds the block itself; of the others, those without context wrote nothing.
    live = 1 + tl.cdiv(length - first, tl.maximum(share, 1) * BLOCK_KEYS)
    part = tl.arange(0, BLOCK_PARTS)
    best = tl.load(part_best + part * (rows * HEADS) + index, mask=part < live, other=float("-inf"))
    highest = tl.max(best, axis=0)
    whole = 0.0
    if sinks is not None:
        sink = tl.load(sinks + index % HEADS)
        highest = tl.maximum(highest, sink)
        whole = tl.exp(sink - highest)
    depth = tl.arange(0, BLOCK_DIM)
    is_depth = depth < HEAD_DIM
    joined = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    some = tl.arange(0, STEP)
    for start in range(0, live, STEP):
        inside = start + some < live
        at = (start + some) * (rows * HEADS) + index
        weight = tl.load(part_best + at, mask=inside, other=float("-inf"))
        weight = tl.exp(weight - highest)
        whole += tl.sum(tl.load(part_total + at, mask=inside, other=0.0) * weight, axis=0)
        values = tl.load(
            part_out + at[:, None] * HEAD_DIM + depth[None, :],
            mask=inside[:, None] & is_depth[None, :],
            other=0.0,
        )
        joined += tl.sum(values * weight[:, None], axis=0)
    joined = joined / whole
    tl.store(out + index * HEAD_DIM + depth, joined, mask=is_depth)


@with_twin
def draft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: PagedContext,
    scale: float,
    *,
    causal: bool = False,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    own_slots: Tensor | None = None,
    blocks: Blocks | None = None,
    tile: AttentionTile | None = None,
) -> Tensor:
    """Grouped-query attention of B blocks; every row sees its context and its own block.

    Scores and softmax are float32; weights are rounded to the values' dtype, as flash attention
    does.

    Args:
        query: float32, bfloat16 or float16 [B, T, heads, head_dim], of which at most 256 rows share
            a key head; the last two dimensions are contiguous, as in key and value.
        key: of the block's rows, [B, T, kv_heads, head_dim], rotated.
        value: of the block's rows, [B, T, kv_heads, head_dim].
        context: keys and values of every request before its block.
        scale: on scores.
        causal: a row sees no later row of its block.
        sliding_window: positions that a row sees on either side, itself included; None sees all.
        sinks: float32 [heads], logits that join each softmax without a value, or None.
        own_slots: int64 [B, T], contiguous, where the block's own keys and values are written on
            the way, none of them a slot of anyone's context; or None.
        blocks: where blocks begin that differ in length. Query, key and value are [N, heads,
            head_dim] then, and ``own_slots`` is [N]. None for B blocks of T rows each.
        tile: None chooses one by the batch alone, so that a captured graph holds at any length.

    Returns:
        In query's shape and dtype.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    batch, rows, heads, kv_heads, head_dim = _check(
        query, key, value, context, sinks, own_slots, blocks
    )
    group = heads // kv_heads
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    total_rows = out.numel() // (heads * head_dim)
    if total_rows == 0:
        return out
    block_dim = max(16, triton.next_power_of_2(head_dim))
    block_rows = max(16, triton.next_power_of_2(rows * group))
    is_ragged = blocks is not None
    live = batch
    if is_ragged:  # The others of a captured pass have no rows, if blocks are half as long.
        live = min(batch, triton.cdiv(2 * total_rows, rows))
    tile = tile or _tile(
        live * kv_heads, block_rows, block_dim, query.dtype, query.device, is_ragged
    )
    count = 1 if tile.parts == 1 else tile.parts + 1
    part_out, part_best, part_total = None, None, None
    if count > 1:
        partial = (count, total_rows, heads)
        part_out = torch.empty(*partial, head_dim, device=query.device)
        part_best, part_total = torch.empty(2, *partial, device=query.device).unbind()
    _part_kernel[(batch, kv_heads, count)](
        query,
        key,
        value,
        context.keys,
        context.values,
        context.slot_table,
        context.lengths,
        context.requests,
        sinks,
        own_slots,
        None if blocks is None else blocks.starts,
        out,
        part_out,
        part_best,
        part_total,
        total_rows,
        _row_stride(query),
        _row_stride(key),
        _row_stride(value),
        context.keys.stride(0),
        context.values.stride(0),
        context.slot_table.stride(0),
        scale,
        sliding_window,
        ROWS=rows,
        GROUP=group,
        HEADS=heads,
        HEAD_DIM=head_dim,
        CAUSAL=causal,
        PRECISION=dot_precision(query.dtype),
        WHOLE=count == 1,
        BLOCK_ROWS=block_rows,
        BLOCK_OWN=max(16, triton.next_power_of_2(rows)),
        BLOCK_KEYS=tile.keys,
        BLOCK_DIM=block_dim,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if count > 1:
        _join_kernel[(total_rows * heads,)](
            part_out,
            part_best,
            part_total,
            sinks,
            context.lengths,
            None if blocks is None else blocks.requests,
            out,
            count,
            total_rows,
            sliding_window,
            ROWS=rows,
            HEADS=heads,
            HEAD_DIM=head_dim,
            BLOCK_KEYS=tile.keys,
            BLOCK_PARTS=triton.next_power_of_2(count),
            STEP=JOINED_AT_ONCE,
            BLOCK_DIM=block_dim,
            num_warps=JOIN_WARPS,
        )
    return out


def _row_stride(part: Tensor) -> int:
    """Between rows of all blocks; the stride of a dimension of one says nothing."""
    return part.stride(0 if part.dim() == 3 or part.shape[1] == 1 else 1)


def _tile(
    shares: int,
    block_rows: int,
    block_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    is_ragged: bool,
) -> AttentionTile:
    """A tile for so many key heads of all requests together, each of ``block_rows`` query rows.

    The fastest of those tried on an H100, and for ragged blocks on an H200
    (``benchmarks/kernels.py``).
    """
    # Two parts gain less than joining them takes.
    parts = min(24, PROGRAMS // shares)
    parts = parts if parts > 2 else 1
    if dtype == torch.float32:  # Multiplied without matrix units, out of registers.
        return AttentionTile(16, 8, 1, parts)
    row_bytes = block_dim * dtype.itemsize
    if parts > 1:
        keys = 32
    elif shares > PROGRAMS:
        keys = 64 if is_ragged else 32
    else:
        keys = 64 if shares > PROGRAMS // 2 else 128
    keys = min(keys, 16_384 // block_dim)  # More would not stay in registers.
    # Queries lie beside the keys and values, and the weights between the two products.
    beside = block_rows * (row_bytes + 4 * keys) + (8 << 10)
    stages = stages_that_fit(3, 2 * keys * row_bytes, beside, device)
    return AttentionTile(keys, 4 if block_rows * block_dim <= 8192 else 8, stages, parts)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: PagedContext,
    sinks: Tensor | None,
    own_slots: Tensor | None,
    blocks: Blocks | None,
) -> tuple[int, int, int, int, int]:
    *leading, heads, head_dim = query.shape
    kv_heads = key.shape[-2]
    if len(leading) != (2 if blocks is None else 1):
        raise ValueError(f"query is {tuple(query.shape)}: give [B, T, ...], or [N, ...] of blocks")
    if key.shape != (*leading, kv_heads, head_dim) or value.shape != key.shape:
        raise ValueError(f"key and value must be {[*leading, 'kv_heads', head_dim]}")
    if blocks is None:
        batch, rows = leading
    else:
        batch, rows = blocks.starts.shape[0] - 1, blocks.max_rows
        for name, part, size in (
            ("starts", blocks.starts, batch + 1),
            ("requests", blocks.requests, leading[0]),
        ):
            if part.shape != (size,) or part.dtype != torch.int32 or not part.is_contiguous():
                raise ValueError(f"{name} of blocks must be contiguous int32 [{size}]")
    if heads % kv_heads or rows * (heads // kv_heads) > MAX_ROWS:
        raise ValueError(
            f"{heads} query heads on {kv_heads} key heads with {rows} rows: give whole groups of "
            f"at most {MAX_ROWS} rows"
        )
    for name, part in (("query", query), ("key", key), ("value", value)):
        rows_apart = (
            blocks is not None or part.stride(0) == rows * part.stride(1) or 1 in (batch, rows)
        )
        if part.dtype != query.dtype or part.dtype not in DTYPES:
            raise ValueError(f"{name} is {part.dtype}: give one of float32, bfloat16, float16")
        if part.stride(-1) != 1 or part.stride(-2) != head_dim or not rows_apart:
            raise ValueError(f"{name} must have contiguous heads and evenly spaced rows")
    for name, pool in (("keys", context.keys), ("values", context.values)):
        if pool.shape[1:] != (kv_heads, head_dim) or not pool[:1].is_contiguous():
            raise ValueError(f"{name} must be [num_slots, {kv_heads}, {head_dim}]")
    if context.lengths.shape != (batch,) or context.lengths.dtype not in INTEGERS:
        raise ValueError(f"lengths must be int32 or int64 [{batch}]")
    if context.slot_table.dim() != 2 or context.slot_table.stride(-1) != 1:
        raise ValueError("slot_table must be [R, positions] with contiguous rows")
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype != torch.float32):
        raise ValueError(f"sinks must be float32 [{heads}]")
    if own_slots is not None and (
        own_slots.shape != tuple(leading)
        or own_slots.dtype != torch.int64
        or not own_slots.is_contiguous()
    ):
        raise ValueError(f"own_slots must be contiguous int64 {leading}")
    return batch, rows, heads, kv_heads, head_dim


def draft_attention_naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: PagedContext,
    scale: float,
    *,
    causal: bool = False,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    own_slots: Tensor | None = None,
    blocks: Blocks | None = None,
    tile: AttentionTile | None = None,
) -> Tensor:
    """``draft_attention`` in plain torch, in float32; reads lengths back to the host."""
    checked = _check(query, key, value, context, sinks, own_slots, blocks)
    batch, rows, heads, kv_heads, _ = checked
    if blocks is not None:
        # One after the other, each a batch of one.
        out, starts = torch.empty_like(query), blocks.starts.tolist()
        for b, (begin, end) in enumerate(pairwise(starts)):
            request = b if context.requests is None else int(context.requests[b])
            one = context._replace(
                slot_table=context.slot_table[request][None],
                lengths=context.lengths[b : b + 1],
                requests=None,
            )
            out[begin:end] = draft_attention_naive(
                query[None, begin:end],
                key[None, begin:end],
                value[None, begin:end],
                one,
                scale,
                causal=causal,
                sliding_window=sliding_window,
                sinks=sinks,
                own_slots=None if own_slots is None else own_slots[None, begin:end],
            )[0]
        return out
    lengths = context.lengths.long()
    longest = int(lengths.max()) if batch else 0
    position = torch.arange(longest, device=query.device)
    known = position < lengths[:, None]
    index = torch.arange(batch, device=query.device)
    if context.requests is not None:
        index = context.requests.long()
    slots = context.slot_table[index, :longest].long().where(known, 0)
    own = torch.arange(rows, device=query.device)
    before = known[:, None].expand(batch, rows, longest)
    distance = own[:, None] - own
    beside = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if sliding_window is not None:
        row_positions = lengths[:, None, None] + own[:, None]
        before = before & (row_positions - position < sliding_window)
        beside = beside & (distance.abs() < sliding_window)
    mask = torch.cat([before, beside.expand(batch, rows, rows)], dim=-1)
    unknown = ~known[..., None, None]
    keys, values = (
        torch.cat([pool[slots].float().masked_fill(unknown, 0), part.float()], dim=1)
        for pool, part in ((context.keys, key), (context.values, value))
    )
    if own_slots is not None:
        context.keys[own_slots] = key.to(context.keys.dtype)
        context.values[own_slots] = value.to(context.values.dtype)
    group = heads // kv_heads
    keys, values = (part.repeat_interleave(group, dim=2) for part in (keys, values))
    scores = torch.einsum("bthd,blhd->bhtl", query.float(), keys) * scale
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].expand(batch, heads, rows, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[1]]
    return torch.einsum("bhtl,blhd->bthd", weights, values).to(query.dtype)
