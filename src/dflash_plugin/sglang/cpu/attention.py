"""Attention on a CPU with the verify mode that SGLang's own back end there lacks."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from torch import Tensor
from torch.nn import functional as F


class CpuAttention(TorchNativeAttnBackend):
    """Scaled dot products over the token pool, one request at a time; correct rather than clever.

    A verify pass is a prefill of a block behind what is committed: causal for the target, and for
    the drafter as its layers say.
    """

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attention [T, heads * value_dim] of the rows of a prefill or a verify pass.

        Args:
            q: [T, heads * head_dim].
            k, v: of the same rows, written to the pool first.
            layer: the ``RadixAttention``.
            forward_batch: SGLang's batch.
            save_kv_cache: whether to write them.
            sinks: [heads], logits that join the softmax without a value.
        """
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        if forward_batch.forward_mode.is_target_verify():
            prefix = forward_batch.seq_lens.tolist()
            info = forward_batch.spec_info
            # Set by our compacted input alone.
            rows = vars(info).get("row_counts") or [info.draft_token_num] * len(prefix)
        else:
            prefix = forward_batch.extend_prefix_lens.tolist()
            rows = forward_batch.extend_seq_lens.tolist()
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        table = self.req_to_token_pool.req_to_token
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = query.new_empty(*query.shape[:2], layer.v_head_dim)
        start = 0
        for request, length, count in zip(
            forward_batch.req_pool_indices.tolist(), prefix, rows, strict=True
        ):
            slots = table[request, : length + count]
            out[start : start + count] = attend(
                query[start : start + count],
                keys[slots].to(q.dtype),
                values[slots].to(q.dtype),
                _mask(layer, length, count),
                layer.scaling,
                sinks,
            )
            start += count
        return out.flatten(1)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention [T, heads, value_dim] of queries [T, heads, dim] over keys [S, kv_heads, dim].

    Values are [S, kv_heads, value_dim], the mask [T, S].
    """
    query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))
    if sinks is None:
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = (query @ keys.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    return (weights @ values)[0].transpose(0, 1)


def _mask(layer: Any, prefix: int, rows: int) -> Tensor:
    """Whether row t behind ``prefix`` committed positions sees position s, bool [rows, S]."""
    query = torch.arange(prefix, prefix + rows)[:, None]
    key = torch.arange(prefix + rows)
    causal = layer.attn_type != AttentionType.ENCODER_ONLY
    visible = key <= query if causal else torch.ones(rows, prefix + rows, dtype=torch.bool)
    if layer.sliding_window_size > -1:
        visible = visible & (key >= query - layer.sliding_window_size)
    return visible
