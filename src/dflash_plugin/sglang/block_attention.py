"""Attention of draft and verify passes under SGLang's Triton back end.

SGLang's back end reads a context serially, once for each query head, and lists the slots of every
request before each pass. ``draft_attention`` takes its place for plain attention over a plain pool;
everything else stays with SGLang's back end.
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
from dflash_plugin.sglang.compat import current
from dflash_plugin.sglang.protocols import AttnBackendLike, ForwardBatchLike

BACKEND = "TritonAttnBackend"
POOL = "MHATokenToKVPool"
CAUSAL, FREE = "decoder", "encoder_only"


@dataclass
class VerifyAttention:
    """Which attention the verify passes of a back end use.

    Attributes:
        used_ours: some pass so far used ``draft_attention``.
        used_native: some pass so far used the back end's own.
        blocks: the rows of each request, or None where all requests always have the same number.
        ragged: in the next pass, requests have different numbers of rows.
    """

    used_ours: bool = False
    used_native: bool = False
    blocks: Blocks | None = None
    ragged: bool = False

    @property
    def only_ours(self) -> bool:
        """Whether all passes so far used ``draft_attention``."""
        return self.used_ours and not self.used_native


def is_plain(pool: Any) -> bool:
    """Whether the rows of SGLang's KV pool can be read and written directly.

    Other pools translate slots, or keep scales beside the values.
    """
    return (
        type(pool).__name__ == POOL  # A subclass may do more.
        and pool.store_dtype == pool.dtype
        and pool.dtype.itemsize > 1
        and not pool.is_quantized_kv_cache
        and all(buffer.dim() == 3 for buffer in (pool.k_buffer[0], pool.v_buffer[0]))
        and not pool.use_hnd
    )


def install(backend: AttnBackendLike, device: torch.device) -> VerifyAttention | None:
    """Let a back end's verify passes use ``draft_attention`` where it gives the same result.

    Args:
        backend: of the target or of the drafter.
        device: of the back end.

    Returns:
        Which attention the back end uses from then on, or None where that is always its own.
    """
    if (
        type(backend).__name__ != BACKEND
        or not kernels.available(device)
        or not _is_plain_backend(backend)
    ):
        return None
    attention = VerifyAttention()
    # In 0.5.16 a batch has no such field.
    has_output = current().forward_batch_has_output
    backend.forward_extend = routed(backend, backend.forward_extend, attention, has_output)
    fill = backend.init_forward_metadata_out_graph
    backend.init_forward_metadata_out_graph = without_lists(fill, attention)
    return attention


def _is_plain_backend(backend: Any) -> bool:
    """Whether a Triton back end only attends to the slots that the request table names."""
    if current().has_kv_index_translator:
        translates = backend.kv_index_translator.is_translating
    else:
        translates = backend._translate_kv_loc is not None
    return (
        is_plain(backend.token_to_kv_pool)
        and backend.dcp_size == 1
        and not backend.enable_deterministic
        and not translates
    )


def without_lists(native: Callable[..., None], attention: VerifyAttention) -> Callable[..., None]:
    """The function that fills a captured pass's metadata, left out where nothing reads these.

    Args:
        native: the back end's own.
        attention: of the same back end; ``draft_attention`` does not read the metadata.
    """

    @wraps(native)
    def fill(forward_batch: ForwardBatchLike, *args: Any, **kwargs: Any) -> None:
        captures = bool(kwargs.get("in_capture", args[0] if args else False))
        verifies = forward_batch.forward_mode.is_target_verify()
        if captures or not verifies or not attention.only_ours:
            native(forward_batch, *args, **kwargs)

    return fill


def routed(
    backend: AttnBackendLike,
    native: Callable[..., Tensor],
    attention: VerifyAttention,
    has_output: bool,
) -> Callable[..., Tensor]:
    """``forward_extend`` of a back end, with ``draft_attention`` where it gives the same result.

    Args:
        backend: holds the metadata of the pass.
        native: the back end's own ``forward_extend``.
        attention: notes which of the two ran.
        has_output: a batch may name the tensor that attention is written to (``compat``).
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
        if has_output:
            usual = usual and forward_batch._attn_output is None
        ours = verifies and usual and _takes(backend, layer, forward_batch, q, attention.blocks)
        attention.used_ours |= ours
        attention.used_native |= verifies and not ours
        if verifies and attention.ragged and not ours:
            raise DFlashError(
                "a layer's attention takes blocks of one length only, but adaptive verification "
                "gave requests different numbers of rows: turn adaptive_verification off"
            )
        if not ours:
            return native(q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **more)
        assert k is not None
        assert v is not None
        return attend(backend, q, k, v, layer, forward_batch, sinks, attention.blocks)

    return forward_extend


def _takes(
    backend: AttnBackendLike,
    layer: Any,
    forward_batch: ForwardBatchLike,
    q: Tensor,
    blocks: Blocks | None,
) -> bool:
    """Whether ``attend`` gives the result that the back end would give."""
    metadata, heads, kv_heads = backend.forward_metadata, layer.tp_q_head_num, layer.tp_k_head_num
    rows, window, kind = metadata.max_extend_len, layer.sliding_window_size, _kind(layer)
    max_rows = rows if blocks is None else blocks.max_rows
    return (
        metadata.custom_mask is None
        and rows is not None
        # A request has this number of rows, on average.
        and q.shape[0] == rows * forward_batch.seq_lens.shape[0]
        and heads % kv_heads == 0
        and max_rows * (heads // kv_heads) <= MAX_ROWS
        and layer.qk_head_dim == layer.v_head_dim
        and not layer.logit_cap
        and layer.xai_temperature_len <= 0
        and layer.k_scale is None
        and not layer.is_cross_attention
        and kind in (CAUSAL, FREE)
        # SGLang's window only limits how far back a row sees, so that a row of a block without
        # causal mask sees all rows behind it. The kernel does so where the window holds the block.
        and (window <= -1 or kind == CAUSAL or max_rows <= window)
        and q.dtype == backend.token_to_kv_pool.dtype
    )


def _kind(layer: Any) -> str:
    return str(layer.attn_type.value)


def attend(
    backend: AttnBackendLike,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Any,
    forward_batch: ForwardBatchLike,
    sinks: Tensor | None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Attention [T, heads * head_dim] of every request's block behind its context.

    Args:
        backend: holds the pool, and the table of requests' slots.
        q: [T, heads * head_dim].
        k: [T, kv_heads, head_dim]; the kernel writes it to the pool.
        v: [T, kv_heads, head_dim]; the kernel writes it to the pool.
        layer: SGLang's ``RadixAttention``.
        forward_batch: of the pass; a captured pass reads its tensors again in every replay.
        sinks: [heads], logits that join the softmax without a value, or None.
        blocks: the rows of each request, or None where all have the same number.
    """
    metadata, pool = backend.forward_metadata, backend.token_to_kv_pool
    window, batch = layer.sliding_window_size, forward_batch.seq_lens.shape[0]
    leading: tuple[int, ...] = (-1,)
    if blocks is None:
        leading = (-1, metadata.max_extend_len)
    else:
        blocks = blocks._replace(
            starts=blocks.starts[: batch + 1], requests=blocks.requests[: len(q)]
        )
    query, key, value = (
        part.view(*leading, heads, layer.qk_head_dim)
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
        own_slots=forward_batch.out_cache_loc[: len(q)].long().view(leading),
        blocks=blocks,
    )
    return out.view(q.shape)
