"""Masked attention over static key/value buffers, for the drafter and the Transformers target."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Grouped-query attention with a boolean mask shared by all heads.

    The query heads of one key/value head are folded into the row dimension, so keys and values
    are read once and never expanded.

    Args:
        query: [B, Hq, T, D].
        key: [B, Hkv, L, D]; Hq is a multiple of Hkv.
        value: [B, Hkv, L, V].
        mask: bool [B, T, L], True where a query may look.
        scale: factor on the scores.
        sinks: [Hq] logits that join each softmax without a value, or None.
        softcap: scores become ``softcap * tanh(scores / softcap)``, or None.

    Returns:
        [B, Hq, T, V] in the query's dtype.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * rows, dim)
    visible = mask[:, None, None].expand(batch, 1, group, rows, mask.shape[-1])
    visible = visible.reshape(batch, 1, group * rows, mask.shape[-1])
    if sinks is None and softcap is None:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=visible, scale=scale)
        return out.reshape(batch, heads, rows, value.shape[-1])
    scores = torch.matmul(folded.float(), key.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.float().view(1, kv_heads, group, 1, 1)
        column = column.expand(batch, kv_heads, group, rows, 1).reshape(
            batch, kv_heads, group * rows, 1
        )
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    out = torch.matmul(weights.to(value.dtype), value)
    return out.reshape(batch, heads, rows, value.shape[-1]).to(query.dtype)
