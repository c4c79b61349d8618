"""FlexAttention's masks are the dense ones, and one compiled kernel serves all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from dflash_plugin.drafter import flex
from dflash_plugin.drafter.config import LayerAttention
from dflash_plugin.drafter.flex import TILE, blocks_mask, obstacle, unfused, visible
from dflash_plugin.drafter.masks import packed_blocks_mask
from tests.helpers.tiny import tiny_config

LAYERS = st.builds(
    LayerAttention, sliding_window=st.none() | st.integers(1, 200), causal=st.booleans()
)


def anchors_of(batch: int, count: int, context: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(context)
    return torch.randint(1, context, (batch, count), generator=generator).sort(dim=1).values


@settings(deadline=None, max_examples=80)
@given(
    layer=LAYERS,
    window_from=st.sampled_from(["query", "anchor"]),
    size=st.sampled_from([2, 8, 10, 16]),
    count=st.integers(1, 40),
    context=st.integers(2, 400),
)
def test_a_mask_by_tiles_is_the_dense_one(layer, window_from, size, count, context):
    anchors = anchors_of(2, count, context)
    found = visible(blocks_mask(layer, window_from, anchors, size, context))
    rows = count * size
    start = found.shape[2] - found.shape[1]
    assert start % TILE == found.shape[1] % TILE == 0
    # No row of a block sees what was padded.
    assert not found[:, :rows, context:start].any()
    assert not found[:, :rows, start + rows :].any()
    unpadded = torch.cat([found[:, :rows, :context], found[:, :rows, start : start + rows]], dim=2)
    assert torch.equal(unpadded, packed_blocks_mask(layer, window_from, anchors, size, context))


def test_tiles_that_no_row_sees_are_skipped_and_others_need_no_rule():
    anchors = torch.arange(600, 632)[None]
    mask = blocks_mask(LayerAttention(), "query", anchors, 8, 1000)
    # Of the context up to 600 four tiles are seen whole and one in part; of the rows, the own tile.
    assert mask.full_kv_num_blocks.tolist() == [[[4, 4]]]
    assert mask.kv_num_blocks.tolist() == [[[2, 2]]]
    narrow = blocks_mask(LayerAttention(sliding_window=20), "query", anchors, 8, 1000)
    assert narrow.full_kv_num_blocks.sum() == 0
    assert narrow.kv_num_blocks.max() <= 3


def test_one_graph_serves_lengths_batches_and_windows(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    first = None
    for batch, count, context, window in (
        (5, 50, 400, None),
        (5, 50, 700, None),
        (5, 90, 130, 40),
        (3, 9, 250, 7),
    ):
        anchors = anchors_of(batch, count, context)
        mask = blocks_mask(LayerAttention(sliding_window=window), "query", anchors, 8, context)
        rows, keys = mask.shape[-2:]
        query = torch.randn(batch, 6, rows, 16)
        key, value = torch.randn(2, batch, 2, keys, 16)
        found = flex._fused(query, key, value, mask, 0.3)
        torch.testing.assert_close(found, unfused(query, key, value, mask, 0.3))
        first = first or counter.frame_count
    assert counter.frame_count == first == 1


@pytest.mark.parametrize(
    ("changes", "version", "named"),
    [
        ({}, "2.11.0+cu130", None),
        ({"head_dim": 8}, "2.11.0", "head_dim is 8, and FlexAttention takes 16 to 256"),
        ({}, "2.8.0", "torch is 2.8.0, and FlexAttention needs 2.9"),
        ({"attention_sinks": True}, "2.11.0", "attention sinks"),
    ],
)
def test_what_keeps_a_gpu_from_it(changes, version, named, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(flex, "find_spec", lambda name: object())
    found = obstacle(tiny_config(**{"head_dim": 64, **changes}), torch.device("cuda"))
    assert (found is None) if named is None else (named in found)


def test_a_gpu_without_triton_has_none(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    assert "Triton is not installed" in obstacle(tiny_config(head_dim=64), torch.device("cuda"))
