"""FlexAttention over the blocks of many anchors, which skips tiles where no row sees a key.

Keys are a text's context and then the rows of its blocks, each padded to whole tiles; queries are
the rows of the blocks. A row sees a contiguous part of the context and a contiguous part of its
block, so that four numbers a row are the whole mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.drafter.config import DrafterConfig, LayerAttention
from dflash_plugin.drafter.interfaces import Attend
from dflash_plugin.drafter.masks import WindowFrom, first_context, sees_block

TILE = 128
MIN_TORCH = (2, 9)
# What the generated kernels take.
HEAD_DIMS = range(16, 257)


def obstacle(config: DrafterConfig, device: torch.device) -> str | None:
    """Why a drafter cannot attend with FlexAttention on a device; None where it can.

    On a CPU it always can, but gains nothing: the mask is spread out there.
    """
    if config.attention_sinks:
        return "the drafter has attention sinks, which FlexAttention has no place for"
    if device.type != "cuda":
        return None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return f"torch is {torch.__version__}, and FlexAttention needs 2.9 or later"
    if find_spec("triton") is None:
        return "Triton is not installed, which compiles FlexAttention"
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim is {config.head_dim}, and FlexAttention takes 16 to 256"
    return None


def flex_attend(
    config: DrafterConfig, stored: Sequence[tuple[Tensor, Tensor]], anchors: Tensor
) -> Attend:
    """Attention of packed blocks over each text's context and their own rows.

    Args:
        config: of the drafter.
        stored: per layer, context keys and values [B, S, kv_heads, head_dim].
        anchors: int64 [B, A].
    """
    size, context = config.block_size, stored[0][0].shape[1]
    masks = {
        layer: blocks_mask(layer, config.window_from, anchors, size, context)
        for layer in set(config.layers)
    }

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        device = query.device.type
        # Autocast casts what scaled_dot_product_attention gets, and leaves FlexAttention's alone.
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        )

        def padded(x: Tensor) -> Tensor:
            return F.pad(x.to(dtype), (0, 0, 0, 0, 0, _padded(x.shape[1]) - x.shape[1]))

        keys, values = (
            torch.cat([padded(of_context), padded(of_blocks)], dim=1).transpose(1, 2)
            for of_context, of_blocks in zip(stored[index], (key, value), strict=True)
        )
        function = _fused if device == "cuda" else unfused
        mask = masks[config.layers[index]]
        out = function(padded(query).transpose(1, 2), keys, values, mask, config.attention_scale)
        return out.transpose(1, 2)[:, : query.shape[1]]

    return attend


@cache
def _compiled() -> Callable[..., Tensor]:
    # The whole graph, as torch would otherwise fall back to an attention that is not fused.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """``unfused`` by one kernel, which serves all lengths, numbers of anchors and windows."""
    # Sizes that happen to be equal at first, or a batch of one, make torch compile once more.
    with torch._dynamo.config.patch(recompile_limit=32):
        return _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)


def unfused(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attention over a mask by tiles that is spread out; torch's own has no backward on a CPU.

    Args:
        query: [B, Hq, rows, D].
        key, value: [B, Hkv, keys, D].
        mask: from ``blocks_mask``.
        scale: factor on the scores.

    Returns:
        [B, Hq, rows, D].
    """
    return masked_attention(query, key, value, visible(mask), scale)


def visible(mask: BlockMask) -> Tensor:
    """What the fused kernel makes of a mask, bool [B, rows, keys].

    It applies the rule in tiles that are seen in part, computes full tiles without, and skips the
    others.
    """
    batch, _, rows, keys = mask.shape
    device = mask.kv_num_blocks.device
    index = [torch.arange(n, device=device) for n in (batch, rows, keys)]
    by_rule = mask.mask_mod(
        index[0][:, None, None], torch.zeros_like(index[0]), index[1][:, None], index[2]
    )
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    in_part = _spread(mask.kv_num_blocks, mask.kv_indices)
    full = _spread(mask.full_kv_num_blocks, mask.full_kv_indices)
    return (by_rule & in_part) | full


def _spread(number: Tensor, indices: Tensor) -> Tensor:
    """Bool [B, rows, keys], True in the listed tiles."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
    tiles = torch.zeros_like(listed).scatter(-1, indices.long(), listed)[:, 0]
    return tiles.repeat_interleave(TILE, dim=1).repeat_interleave(TILE, dim=2)


def blocks_mask(
    layer: LayerAttention, window_from: WindowFrom, anchors: Tensor, block_size: int, context: int
) -> BlockMask:
    """``masks.packed_blocks_mask`` by tiles, with context and rows padded to whole tiles.

    Args:
        layer: the layer's window and causality.
        window_from: where its window counts from.
        anchors: int64 [B, A].
        block_size: T.
        context: context features of each text, S.
    """
    device, count = anchors.device, anchors.shape[1]
    rows = _padded(count * block_size)
    start = _padded(context)
    row = torch.arange(rows, device=device)
    offset = row % block_size
    # Rows of padding see what the last block's see; what comes of them is dropped.
    anchor = anchors[:, (row // block_size).clamp(max=count - 1)]
    context_first = first_context(layer, window_from, anchor, anchor + offset).int()
    context_end = anchor.int()
    place = torch.arange(block_size, device=device)
    seen = sees_block(layer, window_from, place[:, None], place[None])
    block_first = (start + row - offset + seen.int().argmax(dim=1)[offset]).int()
    block_end = (block_first + seen.sum(dim=1)[offset]).int()

    def rule(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        in_context = (key >= context_first[batch, row]) & (key < context_end[batch, row])
        return in_context | ((key >= block_first[row]) & (key < block_end[row]))

    tiles = torch.arange(0, start + rows, TILE, device=device)
    touched_context, full_context = _tiles(context_first, context_end, tiles)
    touched_blocks, full_blocks = _tiles(block_first, block_end, tiles)
    full = full_context | full_blocks
    in_part = (touched_context | touched_blocks) & ~full
    return BlockMask.from_kv_blocks(
        *_listed(in_part), *_listed(full), BLOCK_SIZE=TILE, mask_mod=rule
    )


def _padded(length: int) -> int:
    """Whole tiles; at least two, as torch compiles sizes of one apart."""
    return max(2 * TILE, length + -length % TILE)


def _tiles(first: Tensor, end: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Key tiles that rows [..., rows] may see from ``first`` up to ``end``, and see whole.

    Returns:
        Bool [..., row tiles, key tiles], twice.
    """
    first, end = (bound.unflatten(-1, (-1, TILE))[..., None] for bound in (first, end))
    touched = (first.amin(dim=-2) < tiles + TILE) & (end.amax(dim=-2) > tiles)
    return touched, (first.amax(dim=-2) <= tiles) & (end.amin(dim=-2) >= tiles + TILE)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers int32 [B, 1, row tiles] and indices int32 [B, 1, row tiles, key tiles] of tiles."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1, dtype=torch.int32)[:, None], order[:, None].int().contiguous()
