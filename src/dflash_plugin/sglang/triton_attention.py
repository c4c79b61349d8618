"""Attention of draft and verify passes under SGLang's Triton back end.

That one reads a context serially, and once for every query head, and lists every request's slots
before each pass. What it does beyond plain attention over a plain pool stays its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.draft_attention import (
    MAX_ROWS,
    Blocks,
    PagedContext,
    draft_attention,
)

BACKEND = "TritonAttnBackend"
POOL = "MHATokenToKVPool"
CAUSAL, FREE = "decoder", "encoder_only"


@dataclass
class Passes:
    """Which attention the verify passes of a back end have used so far.

    Attributes:
        ours: some used ``draft_attention``.
        its_own: some used the back end's.
        blocks: where blocks begin that may differ in length, None where they never do.
        uneven: those of the pass that comes do.
    """

    ours: bool = False
    its_own: bool = False
    blocks: Blocks | None = None
    uneven: bool = False

    @property
    def alone(self) -> bool:
        """Whether all passes used ``draft_attention``."""
        return self.ours and not self.its_own


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


def install(backend: Any, device: torch.device) -> Passes | None:
    """Let a back end's verify passes use ``draft_attention`` where it gives the same.

    Args:
        backend: SGLang's, of the target or of the drafter.
        device: where it runs.

    Returns:
        Which attention its passes use from then on, or None where that is the back end's own.
    """
    if (
        type(backend).__name__ != BACKEND
        or not kernels.available(device)
        or not is_plain(backend.token_to_kv_pool)
        or getattr(backend, "dcp_size", 1) > 1
        or getattr(backend, "enable_deterministic", False)
        or _translates(backend)
    ):
        return None
    passes = Passes()
    backend.forward_extend = routed(backend, backend.forward_extend, passes)
    fill = getattr(backend, "init_forward_metadata_out_graph", None)
    if fill is not None:
        backend.init_forward_metadata_out_graph = without_lists(fill, passes)
    return passes


def _translates(backend: Any) -> bool:
    """Whether the slots in the request table are not those of the pool."""
    translator = getattr(backend, "kv_index_translator", None)
    own = getattr(backend, "_translate_kv_loc", None) is not None
    return own or bool(getattr(translator, "is_translating", False))


def without_lists(native: Callable[..., None], passes: Passes) -> Callable[..., None]:
    """What fills a captured pass's metadata, except where only our attention was captured.

    Args:
        native: the back end's own.
        passes: of the same back end.
    """

    @wraps(native)
    def fill(forward_batch: Any, *args: Any, **kwargs: Any) -> None:
        captures = bool(kwargs.get("in_capture", args[0] if args else False))
        verifies = forward_batch.forward_mode.is_target_verify()
        if captures or not verifies or not passes.alone:
            native(forward_batch, *args, **kwargs)

    return fill


def routed(backend: Any, native: Callable[..., Tensor], passes: Passes) -> Callable[..., Tensor]:
    """``forward_extend`` of a back end, ours where it can be.

    Args:
        backend: holds the metadata of the pass.
        native: its own.
        passes: takes which of them ran.
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
        ours = verifies and usual and _takes(backend, layer, forward_batch, q, passes.blocks)
        passes.ours |= ours
        passes.its_own |= verifies and not ours
        if verifies and passes.uneven and not ours:
            raise DFlashError(
                "a layer's attention takes blocks of one length only, but adaptive verification "
                "gave requests different numbers of rows: turn adaptive_verification off"
            )
        if not ours:
            return native(q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **more)
        assert k is not None
        assert v is not None
        return attend(backend, q, k, v, layer, forward_batch, sinks, passes.blocks)

    return forward_extend


def _takes(backend: Any, layer: Any, forward_batch: Any, q: Tensor, blocks: Blocks | None) -> bool:
    """Whether ``attend`` gives what the back end would."""
    metadata, heads, kv_heads = backend.forward_metadata, layer.tp_q_head_num, layer.tp_k_head_num
    rows, window, kind = metadata.max_extend_len, layer.sliding_window_size, _kind(layer)
    most = rows if blocks is None else blocks.max_rows
    return (
        metadata.custom_mask is None
        and getattr(forward_batch, "_attn_output", None) is None
        and rows is not None
        # Every request has as many rows, on average.
        and q.shape[0] == rows * forward_batch.seq_lens.shape[0]
        and heads % kv_heads == 0
        and most * (heads // kv_heads) <= MAX_ROWS
        and layer.qk_head_dim == layer.v_head_dim
        and not layer.logit_cap
        and getattr(layer, "xai_temperature_len", -1) <= 0
        and layer.k_scale is None
        and not layer.is_cross_attention
        and kind in (CAUSAL, FREE)
        # A window looks back only, which in a block this narrow would have to be told.
        and (window <= -1 or kind == CAUSAL or most <= window)
        and q.dtype == backend.token_to_kv_pool.dtype
    )


def _kind(layer: Any) -> str:
    return str(getattr(layer.attn_type, "value", layer.attn_type))


def attend(
    backend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Any,
    forward_batch: Any,
    sinks: Tensor | None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Attention [T, heads * head_dim] of every request's block behind its context.

    Args:
        backend: holds the table of requests' slots, and the pool.
        q: [T, heads * head_dim].
        k: [T, kv_heads, head_dim], written to the pool on the way.
        v: likewise.
        layer: SGLang's ``RadixAttention``.
        forward_batch: of the pass; its tensors stay where they are in a captured one.
        sinks: [heads], or None.
        blocks: where each request's rows begin, or None where all have as many.
    """
    metadata, pool = backend.forward_metadata, backend.token_to_kv_pool
    window, batch = layer.sliding_window_size, forward_batch.seq_lens.shape[0]
    places: tuple[int, ...] = (-1,)
    if blocks is None:
        places = (-1, metadata.max_extend_len)
    else:
        blocks = blocks._replace(
            starts=blocks.starts[: batch + 1], requests=blocks.requests[: len(q)]
        )
    query, key, value = (
        part.view(*places, heads, layer.qk_head_dim)
        for part, heads in ((q, layer.tp_q_head_num), *((x, layer.tp_k_head_num) for x in (k, v)))
    )
    out = draft_attention(
        query,
        key,
        value,
        PagedContext(
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            backend.req_to_token,
            forward_batch.seq_lens,
            forward_batch.req_pool_indices,
        ),
        layer.scaling,
        causal=_kind(layer) == CAUSAL,
        # SGLang does not count the row itself.
        sliding_window=None if window <= -1 else window + 1,
        sinks=None if sinks is None else sinks.float(),
        own_slots=forward_batch.out_cache_loc[: len(q)].long().view(places),
        blocks=blocks,
    )
    return out.view(q.shape)
