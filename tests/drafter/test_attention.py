"""Attention, visibility rules, rotation and static buffers against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.drafter.config import LayerAttention, RopeConfig
from dflash_plugin.drafter.masks import dense_block_mask, packed_blocks_mask
from dflash_plugin.drafter.rope import RotaryEmbedding
from dflash_plugin.drafter.static_kv import KVShape, StaticKV
from tests.helpers.tiny import tiny_config


def naive_attention(query, key, value, mask, scale, sinks, softcap):
    """One head, one row at a time."""
    heads, rows = query.shape[:2]
    out = torch.zeros(heads, rows, value.shape[-1])
    group = heads // key.shape[0]
    for head in range(heads):
        for row in range(rows):
            scores = key[head // group] @ query[head, row] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            exps = torch.where(mask[row], scores.exp(), 0.0)
            total = exps.sum() + (0 if sinks is None else sinks[head].exp())
            out[head, row] = (exps[:, None] * value[head // group]).sum(0) / total
    return out


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masked_attention(sinks, softcap):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 7, generator=generator)
    key, value = torch.randn(2, 2, 2, 11, 7, generator=generator)
    mask = torch.rand(2, 5, 11, generator=generator) < 0.6
    mask[..., 0] = True
    column = torch.randn(6, generator=generator) if sinks else None
    found = masked_attention(query, key, value, mask, 0.4, column, softcap)
    for row in range(2):
        expected = naive_attention(
            query[row], key[row], value[row], mask[row], 0.4, column, softcap
        )
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def visible(layer, window_from, anchor, size, query, key) -> bool:
    """The rules of both dialects, written out."""
    window = layer.sliding_window
    if key < anchor:
        if window is None:
            return True
        return key >= anchor - window if window_from == "anchor" else query - key < window
    if key >= anchor + size or (layer.causal and key > query):
        return False
    return window is None or window_from == "anchor" or abs(query - key) < window


layers = st.builds(
    LayerAttention, sliding_window=st.none() | st.integers(1, 9), causal=st.booleans()
)
origins = st.sampled_from(["query", "anchor"])


@settings(deadline=None, max_examples=100)
@given(layer=layers, window_from=origins, anchors=st.lists(st.integers(0, 12), min_size=1))
def test_block_masks(layer, window_from, anchors):
    size, slots = 4, 20
    mask = dense_block_mask(layer, window_from, torch.tensor(anchors), size, slots)
    for row, anchor in enumerate(anchors):
        expected = [
            [visible(layer, window_from, anchor, size, anchor + q, k) for k in range(slots)]
            for q in range(size)
        ]
        assert mask[row].tolist() == expected


@settings(deadline=None, max_examples=50)
@given(
    layer=layers,
    window_from=origins,
    anchors=st.lists(st.integers(0, 10), min_size=2, max_size=4, unique=True),
)
def test_training_masks_show_each_block_what_the_engine_shows_it(layer, window_from, anchors):
    size, context = 4, 12
    mask = packed_blocks_mask(layer, window_from, torch.tensor([anchors]), size, context)[0]
    engine = dense_block_mask(layer, window_from, torch.tensor(anchors), size, 20)
    for block, anchor in enumerate(anchors):
        for query in range(size):
            row = mask[block * size + query]
            seen = {k for k in range(context) if row[k]}
            for key in range(len(anchors) * size):
                if row[context + key]:
                    assert key // size == block
                    seen.add(anchor + key % size)
            assert seen == {k for k in range(20) if engine[block, query, k]}


@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_rotation_is_that_of_transformers(partial):
    rope = RopeConfig(theta=500.0, partial_rotary_factor=partial)
    config = tiny_config(rope=rope)
    rotary = RotaryEmbedding(config)
    x = torch.randn(2, 9, 4, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(18).view(2, 9) * 3
    found = rotary.rotate(x, rotary.tables(positions, torch.float32))
    width = int(8 * partial)
    inverse = 1 / 500.0 ** (torch.arange(0, width, 2) / width)
    angles = positions[..., None] * inverse
    cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))
    turned, _ = apply_rotary_pos_emb(
        x[..., :width].transpose(1, 2), x[..., :width].transpose(1, 2), cos, sin
    )
    expected = torch.cat([turned.transpose(1, 2), x[..., width:]], dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_interleaved_rotation_turns_neighboring_pairs():
    config = tiny_config(rope=RopeConfig(theta=500.0, interleaved=True))
    rotary = RotaryEmbedding(config)
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    found = rotary.rotate(x, rotary.tables(positions, torch.float32))
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    turn = torch.polar(torch.ones(5, 4), positions[0, :, None] * rotary.inverse_frequencies)
    expected = torch.view_as_real(pairs * turn[None, :, None]).flatten(-2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_static_buffers_forget_by_being_overwritten():
    kv = StaticKV([KVShape(1, 2, 2)], 3, 6, torch.float32, torch.device("cpu"))

    def put(rows, positions, number):
        slots = kv.flat_slots(torch.tensor(positions), torch.tensor(rows))
        block = torch.full((len(rows), len(positions[0]), 1, 2), float(number))
        kv.write(0, block, block, slots)

    put([0, 2], [[0, 1, 2], [0, 1, -1]], 1)
    put([2], [[1, 2, -1]], 2)
    keys, _ = kv.read(0, 3, 4)
    assert keys[:, 0, :, 0].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 2, 2, 0]]
    kv.move_row(2, 1)
    assert kv.read(0, 1, 4, torch.tensor([1]))[1][0, 0, :, 0].tolist() == [1, 2, 2, 0]


def test_slots_of_all_layers_move_at_once():
    """Layers of other shapes too; sources are read before anything is written."""
    shapes = [KVShape(1, 2, 3), KVShape(2, 3, 2), KVShape(1, 2, 3), KVShape(0, 0, 0)]
    kv = StaticKV(shapes, 2, 6, torch.float32, torch.device("cpu"))
    for buffer in (*kv.keys, *kv.values):
        buffer.copy_(torch.arange(7.0)[None, :, None, None].expand_as(buffer))
        buffer[1] += 10
    kv.move_slots(torch.tensor([[3, 5, 2], [4, -1, -1]]), torch.tensor([[1, 2, 3], [2, -1, -1]]))
    for buffer in (*kv.keys[:3], *kv.values[:3]):
        for row, expected in enumerate(([0, 3, 5, 2, 4, 5], [10, 11, 14, 13, 14, 15])):
            assert buffer[row, :6, 0, 0].tolist() == expected
            assert (buffer[row, :6] == buffer[row, :6, :1, :1]).all()
