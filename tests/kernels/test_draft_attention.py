"""Attention of blocks over a paged context, cut into parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.drafter.config import LayerAttention
from dflash_plugin.drafter.masks import dense_block_mask
from dflash_plugin.kernels.draft_attention import (
    AttentionTile,
    Blocks,
    PagedContext,
    draft_attention,
    draft_attention_naive,
)
from tests.helpers.kernel_helpers import DEVICE, DTYPES, error, random

pytestmark = pytest.mark.usefixtures("kernel_device")
# Weights are rounded to the values' dtype in another order.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def context_of(
    lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype
) -> PagedContext:
    """Slots in no order; those that no request has are not numbers."""
    longest = max([0, *lengths]) + 1
    count = len(lengths) * longest
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(2 * count + 1, generator=generator, device="cpu")[:count].to(DEVICE)
    pools = []
    for seed in (0, 1):
        pool = random(2 * count + 1, kv_heads, head_dim, dtype=dtype, seed=seed)
        used = torch.zeros(2 * count + 1, dtype=torch.bool)
        used[order] = True
        pool[~used] = float("nan")
        pools.append(pool)
    return PagedContext(
        *pools,
        slot_table=order.view(len(lengths), longest).int(),
        lengths=torch.tensor(lengths, dtype=torch.int64),
    )


def check(
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    tile: AttentionTile | None,
    context: PagedContext,
    dtype: torch.dtype,
) -> None:
    """The kernel gives what its twin does, and writes the same to the pools."""
    kept = context.keys.clone(), context.values.clone()
    out = draft_attention(*arguments, **options, tile=tile)
    written = context.keys.clone(), context.values.clone()
    context.keys.copy_(kept[0])
    context.values.copy_(kept[1])
    assert error(out, draft_attention_naive(*arguments, **options)) < BOUND[dtype]
    for pool, expected in zip(written, (context.keys, context.values), strict=True):
        assert torch.equal(pool.nan_to_num(7.0), expected.nan_to_num(7.0))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 15, 64, 65, 200]), max_size=4),
    rows=st.sampled_from([1, 4, 13]),
    heads=st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    head_dim=st.sampled_from([16, 24]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    window=st.sampled_from([None, 3, 8, 100]),
    sinks=st.booleans(),
    parts=st.sampled_from([1, 3, None]),
    by_request=st.booleans(),
    narrow=st.booleans(),
    writes=st.booleans(),
)
def test_draft_attention(
    lengths, rows, heads, head_dim, dtype, causal, window, sinks, parts, by_request, narrow, writes
):  # fmt: skip
    query_heads, kv_heads = heads
    context = context_of(lengths, kv_heads, head_dim, dtype)
    if narrow:
        context = context._replace(lengths=context.lengths.int())
    if by_request:
        back = torch.arange(len(lengths)).flip(0)
        context = context._replace(requests=back, slot_table=context.slot_table.flip(0))
    width = (query_heads + 2 * kv_heads) * head_dim
    merged = random(len(lengths), rows, width, dtype=dtype)
    merged = merged.unflatten(-1, (query_heads + 2 * kv_heads, head_dim))
    arguments = (
        *merged.split([query_heads, kv_heads, kv_heads], dim=2),
        context,
        head_dim**-0.5,
    )
    options = {
        "causal": causal,
        "sliding_window": window,
        "sinks": random(query_heads) if sinks else None,
    }
    tile = parts and AttentionTile(keys=32, warps=4, stages=2, parts=parts)
    unused = context.keys[:, 0, 0].isnan().nonzero().flatten()
    size = len(lengths) * rows
    if writes and len(unused) >= size:
        options["own_slots"] = unused.flip(0)[:size].view(len(lengths), rows)
    check(arguments, options, tile, context, dtype)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 15, 65, 200]), min_size=1, max_size=4),
    counts=st.lists(st.sampled_from([0, 1, 2, 5, 7]), min_size=4, max_size=4),
    heads=st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    window=st.sampled_from([None, 8]),
    sinks=st.booleans(),
    parts=st.sampled_from([1, 3, None]),
)
def test_blocks_of_different_lengths(
    lengths, counts, heads, dtype, causal, window, sinks, parts
):  # fmt: skip
    query_heads, kv_heads = heads
    counts = torch.tensor(counts[: len(lengths)])
    context = context_of(lengths, kv_heads, 16, dtype)
    total, places = int(counts.sum()), torch.arange(len(lengths))
    merged = random(total, query_heads + 2 * kv_heads, 16, dtype=dtype)
    blocks = Blocks(
        torch.cat([torch.zeros(1), counts.cumsum(0)]).int(),
        places.repeat_interleave(counts).int(),
        max_rows=7,
    )
    arguments = (
        *merged.split([query_heads, kv_heads, kv_heads], dim=1),
        context,
        0.25,
    )
    options = {
        "causal": causal,
        "sliding_window": window,
        "sinks": random(query_heads) if sinks else None,
        "blocks": blocks,
    }
    unused = context.keys[:, 0, 0].isnan().nonzero().flatten()
    if len(unused) >= total:
        options["own_slots"] = unused[:total].contiguous()
    tile = parts and AttentionTile(keys=32, warps=4, stages=2, parts=parts)
    check(arguments, options, tile, context, dtype)


def test_a_cut_block_gives_the_first_rows_of_the_whole_one():
    context = context_of([40, 3], 2, 16, torch.float32)
    whole = random(2, 6, 8, 16)
    split = [4, 2, 2]
    expected = draft_attention(*whole.split(split, dim=2), context, 1, causal=True)
    cut = torch.cat([whole[0, :4], whole[1, :1]])
    blocks = Blocks(torch.tensor([0, 4, 5]).int(), torch.tensor([0, 0, 0, 0, 1]).int(), 6)
    out = draft_attention(*cut.split(split, dim=1), context, 1, causal=True, blocks=blocks)
    assert error(out, torch.cat([expected[0, :4], expected[1, :1]])) < 1e-5


def test_blocks_of_one_row_out_of_a_merged_projection():
    context = context_of([5, 90, 0], 2, 16, torch.float32)
    merged = random(3, (4 + 2 + 2) * 16)
    query, key, value = (
        part.view(-1, 1, part.shape[1] // 16, 16) for part in merged.split([64, 32, 32], dim=-1)
    )
    assert query.stride(0) != query.stride(1)
    arguments = (query, key, value, context, 0.25)
    assert error(draft_attention(*arguments), draft_attention_naive(*arguments)) < 1e-5


def test_large_scores_do_not_overflow():
    context = context_of([150], 1, 16, torch.float32)
    q, k, v = (100 * random(1, 4, 1, 16, seed=seed) for seed in range(3))
    tile = AttentionTile(keys=64, warps=4, stages=2, parts=2)
    out = draft_attention(q, k, v, context, 1.0, tile=tile)
    assert error(out, draft_attention_naive(q, k, v, context, 1.0)) < 1e-5


def test_rows_see_what_the_drafters_masks_show_them():
    """Against the core's masks and masked attention, with windows from the query."""
    lengths = [5, 40]
    context = context_of(lengths, 2, 16, torch.float32)
    query, key, value = random(2, 4, 8, 16).split([4, 2, 2], dim=2)
    for layer in (LayerAttention(), LayerAttention(causal=True, sliding_window=6)):
        out = draft_attention_naive(
            query, key, value, context, 0.25, causal=layer.causal,
            sliding_window=layer.sliding_window,
        )  # fmt: skip
        for request, length in enumerate(lengths):
            slots = context.slot_table[request, :length].long()
            keys, values = (
                torch.cat([pool[slots], part[request]])[None].transpose(1, 2)
                for pool, part in ((context.keys, key), (context.values, value))
            )
            mask = dense_block_mask(layer, "query", context.lengths[request][None], 4, length + 4)
            queries = query[request][None].transpose(1, 2)
            expected = masked_attention(queries, keys, values, mask, 0.25)
            assert error(out[request][None], expected.transpose(1, 2)) < 1e-5


def test_faulty_arguments():
    context = context_of([5, 9], 2, 16, torch.float32)
    q, k = torch.zeros(2, 4, 4, 16), torch.zeros(2, 4, 2, 16)
    for arguments, message in (
        ((q, k, k[:, :3], context), "key and value must be"),
        ((torch.zeros(2, 4, 3, 16), k, k, context), "3 query heads on 2 key heads"),
        ((q.double(), k, k, context), "query is torch.float64"),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, k, context), "evenly spaced"),
        ((q, k, k, context._replace(lengths=context.lengths[:1])), "lengths must be int32 or"),
        ((q, k, k, context._replace(lengths=context.lengths.float())), "lengths must be int32 or"),
        ((q, k, k, context._replace(slot_table=context.lengths)), "slot_table must be"),
        ((q, k, k, context._replace(keys=context.keys[:, :1])), "keys must be"),
    ):
        with pytest.raises(ValueError, match=message):
            draft_attention(*arguments, 1.0)
    short = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"requests of blocks must be contiguous int32 \[4\]"):
        draft_attention(q[0], k[0], k[0], context, 1.0, blocks=Blocks(short, short, 4))
    with pytest.raises(ValueError, match="of blocks"):
        draft_attention(q, k, k, context, 1.0, blocks=Blocks(short, short, 4))
    for slots in (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"own_slots must be contiguous int64 \[2, 4\]"):
            draft_attention(q, k, k, context, 1.0, own_slots=slots)
