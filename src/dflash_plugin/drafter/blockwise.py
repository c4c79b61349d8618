"""Drafting many blocks of texts that are already known, in one pass of the drafter.

Training, traces and diagnosis draft at many positions of a text without generating it. Each text's
context keys and values are computed once, and the blocks of all its anchors attend to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.drafter.config import DrafterConfig, LayerAttention
from dflash_plugin.drafter.flex import flex_attend
from dflash_plugin.drafter.interfaces import Attend
from dflash_plugin.drafter.masks import packed_blocks_mask
from dflash_plugin.drafter.model import Drafter

BlockAttention = Literal["dense", "flex"]
# Blocks of one pass over a single text.
BLOCKS_PER_PASS = 64
# Rows that attend together. A block sees no other, so the products between blocks are in vain;
# smaller groups make fewer of them, and more launches.
GROUP_ROWS = 256


class Blocks(NamedTuple):
    """Anchors in a batch of texts, and what their blocks should predict.

    Attributes:
        anchors: int64 [B, A], positions.
        valid: bool [B, A], False where a text has too few positions for another anchor.
        tokens: int64 [B, A, T], anchor token and mask tokens: the blocks' inputs.
        labels: int64 [B, A, K], the tokens that follow the anchors.
        label_valid: bool [B, A, K], False beyond a text's end.
    """

    anchors: Tensor
    valid: Tensor
    tokens: Tensor
    labels: Tensor
    label_valid: Tensor


class KnownText(NamedTuple):
    """One text with its context features.

    Attributes:
        tokens: int64 [S].
        features: [S, n * target_hidden], of the target layers that the drafter reads.
        first: position of the first anchor.
    """

    tokens: Tensor
    features: Tensor
    first: int


def make_blocks(
    tokens: Tensor, lengths: Tensor, anchors: Tensor, valid: Tensor, config: DrafterConfig
) -> Blocks:
    """Inputs and labels of the blocks at ``anchors``.

    Args:
        tokens: int64 [B, S], padded texts.
        lengths: int64 [B], tokens of each text.
        anchors: int64 [B, A], positions.
        valid: bool [B, A], which anchors count.
        config: of the drafter.
    """
    batch, count = anchors.shape
    size, drafts = config.block_size, config.num_draft_tokens
    inputs = tokens.new_full((batch, count, size), config.mask_token_id)
    inputs[..., 0] = tokens.gather(1, anchors)
    positions = anchors[..., None] + torch.arange(1, drafts + 1, device=tokens.device)
    inside = (positions < lengths[:, None, None]) & valid[..., None]
    clamped = positions.clamp(max=tokens.shape[1] - 1)
    labels = tokens.gather(1, clamped.view(batch, -1)).view(batch, count, drafts)
    return Blocks(anchors, valid, inputs, labels, inside)


def block_hidden(
    drafter: Drafter, features: Tensor, blocks: Blocks, attention: BlockAttention = "dense"
) -> Tensor:
    """Run the blocks of all anchors in one pass.

    Args:
        drafter: bound to its target.
        features: [B, S, n * target_hidden], context features of the texts.
        blocks: B texts with A anchors each.
        attention: over masks that name every pair of rows and keys, or FlexAttention, which
            ``flex.obstacle`` must allow.

    Returns:
        [B, A, K, hidden], the rows that predict the positions after each anchor.
    """
    config = drafter.config
    batch, context = features.shape[:2]
    count, size = blocks.anchors.shape[1], config.block_size
    context_positions = torch.arange(context, device=features.device).expand(batch, -1)
    stored = list(drafter.context_keys_values(drafter.fuse(features), context_positions))
    positions = blocks.anchors[..., None] + torch.arange(size, device=features.device)
    hidden = drafter.run_block(
        drafter.embed(blocks.tokens.flatten(1)),
        positions.flatten(1),
        flex_attend(config, stored, blocks.anchors)
        if attention == "flex"
        else _dense_attend(drafter, stored, blocks.anchors),
    )
    return hidden.view(batch, count, size, -1)[:, :, size - config.num_draft_tokens :]


def _dense_attend(
    drafter: Drafter, stored: Sequence[tuple[Tensor, Tensor]], anchors: Tensor
) -> Attend:
    """Attention of the blocks at ``anchors`` [B, A] over stored context keys and values."""
    config = drafter.config
    size, context = config.block_size, stored[0][0].shape[1]
    groups = anchors.split(max(1, GROUP_ROWS // size), dim=1)
    masks: dict[LayerAttention, list[Tensor]] = {
        layer: [
            packed_blocks_mask(layer, config.window_from, group, size, context) for group in groups
        ]
        for layer in set(config.layers)
    }
    rows = [group.shape[1] * size for group in groups]

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(
            query.split(rows, dim=1),
            key.split(rows, dim=1),
            value.split(rows, dim=1),
            masks[config.layers[index]],
            strict=True,
        )
        return torch.cat([attend_group(index, *part) for part in parts], dim=1)

    def attend_group(index: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        keys = torch.cat([stored[index][0].to(key.dtype), key], dim=1)
        values = torch.cat([stored[index][1].to(value.dtype), value], dim=1)
        out = masked_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2).to(query.dtype),
            values.transpose(1, 2).to(query.dtype),
            mask,
            config.attention_scale,
            drafter.sinks(index),
        )
        return out.transpose(1, 2)

    return attend


def blocks_of_texts(
    drafter: Drafter, texts: Iterable[KnownText]
) -> Iterator[list[tuple[Blocks, Tensor]]]:
    """Draft the block at every position of each text that has a token after it.

    Args:
        drafter: bound to its target.
        texts: on the drafter's device.

    Yields:
        Per text, a list of passes: blocks [1, A] and hidden states [A, K, hidden] of the rows that
        predict, with A at most ``BLOCKS_PER_PASS``.
    """
    for text in texts:
        tokens, features = text.tokens[None], text.features[None].to(drafter.norm.weight.dtype)
        length = torch.tensor([tokens.shape[1]], device=tokens.device)
        every = torch.arange(text.first, tokens.shape[1] - 1, device=tokens.device)
        passes = []
        for anchors in every[None].split(BLOCKS_PER_PASS, dim=1):
            valid = torch.ones_like(anchors, dtype=torch.bool)
            blocks = make_blocks(tokens, length, anchors, valid, drafter.config)
            passes.append((blocks, block_hidden(drafter, features, blocks)[0]))
        yield passes


def accepted_run(correct: Tensor) -> Tensor:
    """Leading True entries of bool [..., K], int64 [...]."""
    return correct.long().cumprod(dim=-1).sum(dim=-1)


def block_starts(runs: Sequence[int]) -> Iterator[int]:
    """Positions at which blocks begin when a text is decoded greedily.

    Args:
        runs: per position, the leading drafts of its block that are right. The next block begins
            one position after the last of them.
    """
    position = 0
    while position < len(runs):
        yield position
        position += int(runs[position]) + 1
