"""The pages that draft layers ask for, and what each of several pages of a layer gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from dflash_plugin.vllm.attention import PagedAttention, as_large_as_target, page_count
from tests.on_vllm.test_vllm_groups import BLOCK, attention, config

TOKENS, HEADS, KV_HEADS, WIDTH = 5, 8, 4, 16


class Page(nn.Module):
    """A page that gives back its queries and keeps what is written."""

    def __init__(self, sinks: Tensor | None = None) -> None:
        super().__init__()
        self.written: list[Any] = []
        self.kv_cache = object()
        self.impl = SimpleNamespace(sinks=sinks, do_kv_cache_update=self.write)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert key.shape == value.shape == (TOKENS, KV_HEADS // 2 * WIDTH)
        return query

    def write(self, page: Any, key: Tensor, value: Tensor, cache: Any, slots: Tensor) -> None:
        assert page is self
        assert cache is self.kv_cache
        self.written.append((key, value, slots))


def paged(*pages: Page) -> PagedAttention:
    layer = PagedAttention.__new__(PagedAttention)
    nn.Module.__init__(layer)
    layer.pages = nn.ModuleList(pages)
    return layer


def test_pages_attend_with_their_own_heads_in_order():
    query = torch.randn(TOKENS, HEADS, WIDTH)
    key, value = torch.randn(2, TOKENS, KV_HEADS, WIDTH)
    assert torch.equal(paged(Page(), Page())(query, key, value), query.flatten(-2))


def test_each_page_is_written_with_its_own_heads_and_slots():
    key, value = torch.randn(2, TOKENS, KV_HEADS, WIDTH)
    first, second = Page(), Page()
    slots = torch.arange(TOKENS)
    paged(first, second).store(key, value, [slots, slots + TOKENS])
    for page, heads, into in ((first, slice(0, 2), slots), (second, slice(2, 4), slots + TOKENS)):
        [(keys, values, written)] = page.written
        assert torch.equal(keys, key[:, heads])
        assert torch.equal(values, value[:, heads])
        assert torch.equal(written, into)
    paged(first, second).store(key, value, [None, slots])
    assert (len(first.written), len(second.written)) == (1, 2)


def test_each_page_takes_the_sinks_of_its_own_heads():
    pages = Page(torch.zeros(4)), Page(torch.zeros(4)), Page(None)
    paged(*pages[:2]).take_sinks(torch.arange(8.0))
    assert pages[0].impl.sinks.tolist() == [0, 1, 2, 3]
    assert pages[1].impl.sinks.tolist() == [4, 5, 6, 7]
    paged(pages[2]).take_sinks(torch.arange(4.0))
    assert pages[2].impl.sinks is None


@pytest.mark.parametrize(
    ("heads", "width", "pages"),
    [(4, 256, 1), (8, 128, 1), (4, 128, 1), (8, 256, 2), (16, 128, 2), (12, 256, 3), (6, 192, 2),
     (5, 256, 5), (1, 2048, 1)],
)  # fmt: skip
def test_heads_are_divided_among_pages_that_fit_the_targets(heads, width, pages):
    assert page_count(heads, width, config({})) == pages


@pytest.mark.parametrize("setting", ["is_hybrid", "use_mla"])
def test_other_targets_get_whole_pages_of_any_size(setting):
    settings = config({})
    setattr(settings.model_config, setting, not getattr(settings.model_config, setting))
    assert page_count(8, 256, settings) == 1
    assert as_large_as_target(attention(4, 128), settings) == attention(4, 128)


def test_a_smaller_page_is_padded_unless_blocks_are_divided_or_moved():
    settings, small, page = config({}), attention(4, 128), attention().page_size_bytes
    padded = as_large_as_target(small, settings)
    assert (padded.page_size_bytes, padded.block_size) == (page, BLOCK)
    assert (padded.num_kv_heads, padded.head_size) == (4, 128)
    for same in (attention(8, 128), attention(8, 256)):
        assert as_large_as_target(same, settings) == same
    settings.kv_transfer_config = object()
    assert as_large_as_target(small, settings) == small


def test_a_back_end_that_divides_blocks_gets_no_padded_page(monkeypatch):
    class Whole(AttentionBackend):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [MultipleOf(16)]

    class Divides(Whole):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [16, 48]

    for backend, is_padded in ((Whole, True), (Divides, False)):
        layer = SimpleNamespace(get_attn_backend=lambda backend=backend: backend)
        monkeypatch.setattr(
            "dflash_plugin.vllm.attention.get_layers_from_vllm_config",
            lambda vllm_config, kind, layer=layer: {"layer": layer},
        )
        padded = as_large_as_target(attention(4, 128), config({}))
        assert (padded.page_size_padded is not None) == is_padded
