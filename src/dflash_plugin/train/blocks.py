"""Random anchors and the attention of all their blocks in one pass.

Each sequence keeps its context keys and values once; the blocks of its anchors stand behind them.
The mask is made of the rules in ``visibility``, the ones that the engine uses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.drafter.config import DrafterConfig, LayerAttention
from dflash_plugin.drafter.masks import WindowFrom, sees_block, sees_context
from dflash_plugin.train.sequences import Batch


class Blocks(NamedTuple):
    """Anchors of a batch and what their blocks should predict.

    Attributes:
        anchors: int64 [B, A], positions.
        valid: bool [B, A], False where a sequence had too few positions for another anchor.
        tokens: int64 [B, A, T], anchor token and masks: the blocks' inputs.
        labels: int64 [B, A, K], the tokens that follow.
        label_valid: bool [B, A, K], False beyond a sequence's end.
    """

    anchors: Tensor
    valid: Tensor
    tokens: Tensor
    labels: Tensor
    label_valid: Tensor


def choose_anchors(
    batch: Batch, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Distinct random positions of each response that have a token after them.

    Args:
        batch: B sequences.
        count: anchors a sequence, A.
        generator: on the batch's device; None takes every position from the response's start.

    Returns:
        Anchors int64 [B, A], sorted, and which of them are valid, bool [B, A].
    """
    lengths, prompt_lengths = batch.lengths, batch.prompt_lengths
    offsets = torch.arange(max(batch.longest_response, count), device=lengths.device)
    available = lengths - prompt_lengths - 1
    if generator is None:
        order = offsets.expand(len(lengths), -1)[:, :count]
    else:
        draw = torch.rand(len(lengths), len(offsets), generator=generator, device=lengths.device)
        draw = draw.masked_fill(offsets >= available[:, None], 2.0)
        order = draw.argsort(dim=1)[:, :count]
    valid = order < available[:, None]
    order, index = torch.where(valid, order, len(offsets)).sort(dim=1)
    valid = valid.gather(1, index)
    return torch.where(valid, prompt_lengths[:, None] + order, prompt_lengths[:, None]), valid


def make_blocks(
    tokens: Tensor, lengths: Tensor, anchors: Tensor, valid: Tensor, config: DrafterConfig
) -> Blocks:
    """Inputs and labels of the blocks at ``anchors`` [B, A] of ``tokens`` int64 [B, S]."""
    batch, count = anchors.shape
    size, drafts = config.block_size, config.num_draft_tokens
    inputs = tokens.new_full((batch, count, size), config.mask_token_id)
    inputs[..., 0] = tokens.gather(1, anchors)
    positions = anchors[..., None] + torch.arange(1, drafts + 1, device=tokens.device)
    inside = (positions < lengths[:, None, None]) & valid[..., None]
    clamped = positions.clamp(max=tokens.shape[1] - 1)
    labels = tokens.gather(1, clamped.view(batch, -1)).view(batch, count, drafts)
    return Blocks(anchors, valid, inputs, labels, inside)


def training_mask(
    layer: LayerAttention, window_from: WindowFrom, anchors: Tensor, block_size: int, context: int
) -> Tensor:
    """What the blocks of one pass see.

    Args:
        layer: the layer's window and causality.
        window_from: where its window counts from.
        anchors: int64 [B, A].
        block_size: T.
        context: context features a sequence, S.

    Returns:
        bool [B, A * T, S + A * T]: context first, then the blocks.
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
