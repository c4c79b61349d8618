"""Attention of draft and verify passes under SGLang's Triton back end.

That one reads a context serially, and once for every query head. What it does beyond plain
attention over a plain pool stays its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.config import LayerAttention

BACKEND = "TritonAttnBackend"
POOL = "MHATokenToKVPool"
CAUSAL, FREE = "decoder", "encoder_only"


def is_plain(pool: Any) -> bool:
    """Whether a pool's rows can be read and written as they are.

    Others translate slots or keep scales beside the values.
    """
    return (
        type(pool).__name__ == POOL
        and pool.store_dtype == pool.dtype
        and pool.dtype.itemsize > 1
        and not getattr(pool, "is_quantized_kv_cache", False)
        and all(buffer.dim() == 3 for buffer in (pool.k_buffer[0], pool.v_buffer[0]))
        and not getattr(pool, "use_hnd", False)
    )


def install(backend: Any, device: torch.device) -> bool:
    """Let a back end's verify passes use ``draft_attention`` where it gives the same.

    Args:
        backend: SGLang's, of the target or of the drafter.
        device: where it runs.

    Returns:
        Whether it is one that this speeds up.
    """
    if (
        type(backend).__name__ != BACKEND
        or not kernels.available(device)
        or not is_plain(backend.token_to_kv_pool)
        or getattr(backend, "dcp_size", 1) > 1
        or getattr(backend, "enable_deterministic", False)
    ):
        return False
    backend.forward_extend = routed(backend, backend.forward_extend)
    return True


def routed(backend: Any, native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``forward_extend`` of a back end, ours where it can be.

    Args:
        backend: holds the metadata of the pass.
        native: its own.
    """

    @wraps(native)
    def forward_extend(
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        verifies = forward_batch.forward_mode.is_target_verify()
        usual = k is not None and v is not None and save_kv_cache
        usual = usual and all(value is None for value in more.values())
        if not (verifies and usual and _takes(backend, layer, forward_batch, q)):
            return native(q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **more)
        assert k is not None
        assert v is not None
        return attend(backend, q, k, v, layer, forward_batch.out_cache_loc, sinks)

    return forward_extend


def _takes(backend: Any, layer: Any, forward_batch: Any, q: Tensor) -> bool:
    """Whether ``attend`` gives what the back end would."""
    from dflash_plugin.kernels.draft_attention import MOST_ROWS

    metadata, heads, kv_heads = backend.forward_metadata, layer.tp_q_head_num, layer.tp_k_head_num
    rows, window, kind = metadata.max_extend_len, layer.sliding_window_size, _kind(layer)
    starts, _ = _listed(metadata, window)
    return (
        metadata.custom_mask is None
        and getattr(forward_batch, "_attn_output", None) is None
        and rows is not None
        and starts is not None
        # Every request has a whole block.
        and q.shape[0] == rows * (starts.shape[0] - 1)
        and heads % kv_heads == 0
        and rows * (heads // kv_heads) <= MOST_ROWS
        and layer.qk_head_dim == layer.v_head_dim
        and not layer.logit_cap
        and getattr(layer, "xai_temperature_len", -1) <= 0
        and layer.k_scale is None
        and not layer.is_cross_attention
        and kind in (CAUSAL, FREE)
        # A window looks back only, which in a block this narrow would have to be told.
        and (window <= -1 or kind == CAUSAL or rows <= window)
        and q.dtype == backend.token_to_kv_pool.dtype
    )


def _kind(layer: Any) -> str:
    return str(getattr(layer.attn_type, "value", layer.attn_type))


def _listed(metadata: Any, window: int) -> tuple[Any, Any]:
    """Where each request's slots begin in a list, and the list, which a window shortens."""
    if window <= -1:
        return metadata.kv_indptr, metadata.kv_indices
    return metadata.window_kv_indptr, metadata.window_kv_indices


def attend(
    backend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Any,
    own_slots: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """Attention [T, heads * head_dim] of every request's block behind its context.

    Args:
        backend: its metadata lists each request's slots.
        q: [T, heads * head_dim].
        k: [T, kv_heads, head_dim], written to the pool on the way.
        v: likewise.
        layer: SGLang's ``RadixAttention``.
        own_slots: [T], where they go.
        sinks: [heads], or None.
    """
    from dflash_plugin.kernels.draft_attention import PagedContext, draft_attention

    metadata, pool = backend.forward_metadata, backend.token_to_kv_pool
    window, rows = layer.sliding_window_size, metadata.max_extend_len
    starts, slots = _listed(metadata, window)
    query, key, value = (
        part.view(-1, rows, heads, layer.qk_head_dim)
        for part, heads in ((q, layer.tp_q_head_num), *((x, layer.tp_k_head_num) for x in (k, v)))
    )
    out = draft_attention(
        query,
        key,
        value,
        PagedContext(
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            slots,
            lengths=None,
            starts=starts,
        ),
        LayerAttention(
            causal=_kind(layer) == CAUSAL,
            # SGLang does not count the row itself.
            sliding_window=None if window <= -1 else window + 1,
        ),
        layer.scaling,
        sinks=None if sinks is None else sinks.float(),
        own_slots=own_slots[: len(q)].long().view(-1, rows),
    )
    return out.view(q.shape)
