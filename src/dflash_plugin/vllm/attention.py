"""Attention of draft layers over vLLM's paged cache, in pages that fit the target's groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.worker.utils import select_common_block_size

if TYPE_CHECKING:
    from dflash_plugin.drafter.latent_attention import LatentAttention
    from dflash_plugin.drafter.layers import DraftAttention as Heads
    from dflash_plugin.vllm.protocols import VllmConfig

# A back end that wants one window for all layers of a cache group.
ONE_WINDOW = "FLASHINFER"


class DraftAttention(Attention):
    """Heads of a draft layer, with a page of the cache for each block.

    vLLM makes cache groups of layers with the same kind of cache, as large as the smallest kind has
    layers. A few draft layers with windows would therefore break the target's one group into many,
    each of which has a block table and metadata in every step. A layer that allocates like one
    without a window joins the target's group. ``cache_groups`` decides it for hybrid targets.
    """

    sliding_window: int | None
    joins_full_layers = False

    def __init__(self, *args: Any, cache_config: Any, **kwargs: Any) -> None:
        # A layer without a window would take the one that Mistral gives all of the target's layers.
        of_target, cache_config.sliding_window = cache_config.sliding_window, None
        try:
            super().__init__(*args, cache_config=cache_config, **kwargs)
        finally:
            cache_config.sliding_window = of_target

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """The kind of cache of these heads."""
        return as_large_as_target(self._kind(vllm_config), vllm_config)

    def _kind(self, vllm_config: Any) -> Any:
        window, joins = self.sliding_window, self.joins_full_layers
        if window is None or not joins or self.attn_backend.get_name() == ONE_WINDOW:
            return super().get_kv_cache_spec(vllm_config)
        self.sliding_window = None
        try:
            spec = super().get_kv_cache_spec(vllm_config)
        finally:
            self.sliding_window = window
        # Known to it are windows of one size only; it looks whether there is one.
        return replace(spec, sliding_window=window)


class PagedAttention(nn.Module):
    """A draft layer's attention, its heads divided so that no page is larger than the target's.

    Args:
        vllm_config: of the engine.
        name: of the layer; vLLM knows the first share of the heads by it.
        attention: the draft layer's, for heads, width and sinks.
        scale: of the scores.
        window: tokens that a row sees, itself included; None is all.
        joins_full_layers: whether a layer with a window may allocate like one without.

    Attributes:
        pages: the attention of each share of the heads, in order.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        name: str,
        attention: Heads | LatentAttention,
        *,
        scale: float | None,
        window: int | None,
        joins_full_layers: bool,
    ) -> None:
        super().__init__()
        count = page_count(attention.kv_heads, attention.head_dim, vllm_config)
        sinks = [] if attention.sinks is None else attention.sinks.chunk(count)
        self.pages = nn.ModuleList(
            DraftAttention(
                attention.heads // count,
                attention.head_dim,
                scale,
                num_kv_heads=attention.kv_heads // count,
                cache_config=vllm_config.cache_config,
                # Not the target's: a drafter stays as its own checkpoint says.
                quant_config=None,
                per_layer_sliding_window=window,
                prefix=f"{name}_{index}" if index else name,
                **({"sinks": sinks[index]} if sinks else {}),
            )
            for index in range(count)
        )
        for page in self:
            page.joins_full_layers = joins_full_layers

    def __iter__(self) -> Iterator[DraftAttention]:
        return iter(cast(Sequence[DraftAttention], self.pages))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention [T, heads * head_dim] of rows [T, heads or kv_heads, head_dim]."""
        if len(self.pages) == 1:
            whole: Tensor = self.pages[0](query.flatten(-2), key.flatten(-2), value.flatten(-2))
            return whole
        q, k, v = (rows.chunk(len(self.pages), dim=-2) for rows in (query, key, value))
        out = [
            page(q[index].flatten(-2), k[index].flatten(-2), v[index].flatten(-2))
            for index, page in enumerate(self.pages)
        ]
        return torch.cat(out, dim=-1)

    def take_sinks(self, sinks: Tensor) -> None:
        """Copy new attention sinks [heads] to where a back end has cast its own from the old."""
        for layer, share in zip(self, sinks.chunk(len(self.pages)), strict=True):
            kept = cast(Any, layer).impl.sinks
            if kept is not None and kept.data_ptr() != share.data_ptr():
                kept.copy_(share)

    def store(self, key: Tensor, value: Tensor, slots: Sequence[Tensor | None]) -> None:
        """Write context rows into the cache.

        Args:
            key: [T, kv_heads, head_dim].
            value: likewise.
            slots: for each page, the slots [T], or None to write nothing; rows at -1 are dropped.
        """
        shares = zip(*(rows.chunk(len(self.pages), dim=-2) for rows in (key, value)), strict=True)
        for layer, (keys, values), into in zip(self, shares, slots, strict=True):
            if into is not None:
                page = cast(Any, layer)
                page.impl.do_kv_cache_update(page, keys, values, page.kv_cache, into)


def page_count(kv_heads: int, head_dim: int, vllm_config: VllmConfig) -> int:
    """Shares of a draft layer's heads that each fit a page of a target with recurrent layers.

    vLLM makes all pages as large as the largest. A larger one of the drafter's would enlarge the
    blocks of the target's attention, at whose ends prefix hits end, and the memory of every state
    of its recurrent layers.

    Args:
        kv_heads: key and value heads of the layer, on this rank.
        head_dim: their width.
        vllm_config: of the engine.
    """
    target = _heads_of_hybrid(vllm_config)
    if target is None:
        return 1
    shares = (count for count in range(1, kv_heads + 1) if kv_heads % count == 0)
    fitting = (count for count in shares if kv_heads // count * head_dim <= math.prod(target))
    return next(fitting, 1)


def _heads_of_hybrid(vllm_config: VllmConfig) -> tuple[int, int] | None:
    """Key and value heads, and their width, of a target with recurrent and plain attention."""
    model = vllm_config.model_config
    if not model.is_hybrid or model.use_mla:
        return None
    return model.get_num_kv_heads(vllm_config.parallel_config), model.get_head_size()


def as_large_as_target(spec: Any, vllm_config: VllmConfig) -> Any:
    """``spec`` with a smaller page padded to that of a target with recurrent layers.

    vLLM would give it larger blocks instead, and prefix hits would end at those.
    """
    target, block = _heads_of_hybrid(vllm_config), vllm_config.cache_config.block_size
    # No connector is known to move padded pages.
    if target is None or spec.block_size != block or vllm_config.kv_transfer_config is not None:
        return spec
    heads, width = target
    page = replace(spec, num_kv_heads=heads, head_size=width, head_size_v=width).page_size_bytes
    if spec.page_size_bytes >= page:
        return spec
    layers = get_layers_from_vllm_config(vllm_config, Attention).values()
    # A back end that divides blocks would find the parts of a padded one at uneven distances.
    if select_common_block_size(block, list({x.get_attn_backend() for x in layers})) != block:
        return spec
    return replace(spec, page_size_padded=page)
