"""Which keys a draft block's queries may see, as small rules over token positions.

A block of ``block_size`` rows starts at the anchor's position. Its queries see context features
before the anchor and rows of their own block. The rules take broadcastable integer tensors, so they
are evaluated over a cache as well as over the blocks of many anchors of one text.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dflash_plugin.drafter.config import LayerAttention

WindowFrom = Literal["query", "anchor"]


def first_context(
    layer: LayerAttention, window_from: WindowFrom, anchor: Tensor, query: Tensor
) -> Tensor:
    """First context position that ``query`` of the block at ``anchor`` sees; may lie below zero.

    It sees all from there up to the anchor. Source: ``_attention_mask`` in PyPI dflash 0.1.0
    (window from the query) and ``create_anchor_block_mask_mod`` in PyPI speculators 0.9.0 (window
    from the anchor).
    """
    if layer.sliding_window is None:
        return torch.zeros_like(query)
    if window_from == "anchor":
        return anchor - layer.sliding_window
    return query - layer.sliding_window + 1


def sees_context(
    layer: LayerAttention, window_from: WindowFrom, anchor: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    """Whether ``query`` of the block at ``anchor`` sees the context feature at ``key``."""
    before_anchor = key < anchor
    if layer.sliding_window is None:
        return before_anchor
    return before_anchor & (key >= first_context(layer, window_from, anchor, query))


def sees_block(
    layer: LayerAttention, window_from: WindowFrom, query: Tensor, key: Tensor
) -> Tensor:
    """Whether ``query`` sees the row at position ``key`` of its own block.

    What it sees is contiguous and holds itself. Source: as for ``first_context``.
    """
    distance = query - key
    visible = distance >= 0 if layer.causal else torch.ones_like(distance, dtype=torch.bool)
    if layer.sliding_window is not None and window_from == "query":
        visible = visible & (distance.abs() < layer.sliding_window)
    return visible


def dense_block_mask(
    layer: LayerAttention,
    window_from: WindowFrom,
    anchors: Tensor,
    block_size: int,
    num_keys: int,
) -> Tensor:
    """Visibility of cache slots, where slot ``j`` of a row holds position ``j``.

    Args:
        layer: the layer's window and causality.
        window_from: where its window counts from.
        anchors: int64 [B], the anchor's position in each row.
        block_size: rows of a block, T.
        num_keys: slots looked at, L.

    Returns:
        bool [B, T, L].
    """
    anchor = anchors[:, None, None]
    query = anchor + torch.arange(block_size, device=anchors.device)[None, :, None]
    key = torch.arange(num_keys, device=anchors.device)[None, None, :]
    in_block = (key >= anchor) & (key < anchor + block_size)
    return sees_context(layer, window_from, anchor, query, key) | (
        in_block & sees_block(layer, window_from, query, key)
    )


def packed_blocks_mask(
    layer: LayerAttention, window_from: WindowFrom, anchors: Tensor, block_size: int, context: int
) -> Tensor:
    """What the blocks of one pass see, where a text's context keys come first and its blocks after.

    Args:
        layer: the layer's window and causality.
        window_from: where its window counts from.
        anchors: int64 [B, A].
        block_size: T.
        context: context features of each text, S.

    Returns:
        bool [B, A * T, S + A * T].
    """
    batch, count = anchors.shape
    device = anchors.device
    block = torch.arange(count * block_size, device=device) // block_size
    row_anchor = anchors.repeat_interleave(block_size, dim=1)
    row = row_anchor + torch.arange(block_size, device=device).repeat(count)
    key = torch.arange(context, device=device)
    on_context = sees_context(
        layer, window_from, row_anchor[:, :, None], row[:, :, None], key[None, None]
    )
    same_block = block[:, None] == block[None]
    on_block = same_block & sees_block(layer, window_from, row[:, :, None], row[:, None])
    return torch.cat([on_context, on_block.expand(batch, -1, -1)], dim=2)
