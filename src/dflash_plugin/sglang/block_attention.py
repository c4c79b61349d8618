"""Attention of draft and verify passes under SGLang's attention back ends.

``draft_attention`` takes the place of a back end's own attention for blocks, where it gives the
same result: for plain attention over a plain pool. It reads slots from the request table, so a
captured pass needs no metadata, and it takes requests with different numbers of rows. Prompts, and
everything that is more than plain, stay with the back end, as do larger batches of the target under
FlashAttention, which is faster there.
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
from dflash_plugin.sglang.compat import argument, current
from dflash_plugin.sglang.protocols import ForwardBatchLike, ModelRunnerLike

TRITON, FLASH_ATTENTION, FLASHINFER = (
    "TritonAttnBackend",
    "FlashAttentionBackend",
    "FlashInferAttnBackend",
)
POOL = "MHATokenToKVPool"
# FlashAttention 3 is faster for more requests of the target, the more so with long contexts. For
# one or two, writing keys and values and preparing the pass take as long as the attention.
FEW_REQUESTS = 2
# Likewise for cut passes of few rows, which are captured with a slot for every row.
FEW_ROWS = 64
CAUSAL, FREE = "decoder", "encoder_only"


@dataclass
class BlockAttention:
    """Which attention the draft or verify passes of a back end use.

    Attributes:
        pool: SGLang's KV pool of the back end's model.
        req_to_token: int32 [requests, tokens], the slots of each request's tokens.
        native_rows: rows of a request that the back end's own attention takes in a verify pass,
            whatever rows the pass has; None where it goes by the pass.
        max_requests: larger batches stay with the back end's own attention; None limits none.
        max_rows: passes of more rows stay with it too; None limits none.
        used_ours: some pass so far used ``draft_attention``.
        used_native: some pass so far used the back end's own.
        refused: some layer needs the back end's own, however few requests there are.
        blocks: the rows of each request, or None where all requests always have the same number.
        ragged: in the next pass, requests have different numbers of rows.
    """

    pool: Any
    req_to_token: Tensor
    native_rows: int | None = None
    max_requests: int | None = None
    max_rows: int | None = None
    used_ours: bool = False
    used_native: bool = False
    refused: bool = False
    blocks: Blocks | None = None
    ragged: bool = False

    @property
    def only_ours(self) -> bool:
        """Whether all passes so far used ``draft_attention``."""
        return self.used_ours and not self.used_native

    def takes(self, requests: int, rows: int) -> bool:
        """Whether a pass of so many requests and rows is small enough."""
        return (self.max_requests is None or requests <= self.max_requests) and (
            self.max_rows is None or rows <= self.max_rows
        )

    def replaces(self, requests: int, rows: int) -> bool:
        """Whether nothing of a captured pass reads what the back end prepares."""
        return self.used_ours and not self.refused and self.takes(requests, rows)


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


def install(runner: ModelRunnerLike, device: torch.device) -> BlockAttention | None:
    """Let a runner's passes over blocks use ``draft_attention`` where it gives the same result.

    Args:
        runner: of the target or of the drafter, with its pools.
        device: of the runner.

    Returns:
        Which attention the runner's back end uses from then on, or None where that is always its
        own.
    """
    backend = runner.attn_backend
    if not _is_replaceable(backend, runner, device):
        return None
    attention = BlockAttention(runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token)
    if type(backend).__name__ == FLASH_ATTENTION:
        attention.native_rows = int(backend.speculative_num_draft_tokens)
        attention.max_requests = None if runner.is_draft_worker else FEW_REQUESTS
    _route(backend, attention)
    return attention


def install_for_cut_passes(
    backend: Any, runner: ModelRunnerLike, device: torch.device, blocks: Blocks
) -> BlockAttention | None:
    """Let captured cut passes of few rows use ``draft_attention`` under FlashAttention.

    Args:
        backend: of the captured cut passes alone.
        runner: of the target, with its pools.
        device: of the runner.
        blocks: the rows of each request of every pass.

    Returns:
        Which attention the back end uses from then on, or None where that is always its own.
    """
    if type(backend).__name__ != FLASH_ATTENTION or not _is_replaceable(backend, runner, device):
        return None
    attention = BlockAttention(
        runner.token_to_kv_pool,
        runner.req_to_token_pool.req_to_token,
        max_rows=FEW_ROWS,
        blocks=blocks,
    )
    _route(backend, attention)
    return attention


def _is_replaceable(backend: Any, runner: ModelRunnerLike, device: torch.device) -> bool:
    """Whether ``draft_attention`` can take the place of a back end's own attention."""
    is_plain_backend = PLAIN.get(type(backend).__name__)
    return (
        is_plain_backend is not None
        and kernels.available(device)
        and is_plain(runner.token_to_kv_pool)
        and not argument(runner.server_args, "enable_deterministic_inference")
        and argument(runner.server_args, "dcp_size") in (None, 1)
        and is_plain_backend(backend)
    )


def _route(backend: Any, attention: BlockAttention) -> None:
    backend.forward_extend = routed(backend.forward_extend, attention)
    fill = backend.init_forward_metadata_out_graph
    backend.init_forward_metadata_out_graph = without_metadata(fill, attention)


def _is_plain_triton(backend: Any) -> bool:
    if current().has_kv_index_translator:
        return not _translates(backend)
    return backend._translate_kv_loc is None


def _is_plain_flash_attention(backend: Any) -> bool:
    translates = current().has_kv_index_translator and _translates(backend)
    return not (
        # Version 4 is faster than the kernel on the GPUs that it is for.
        backend.fa_impl_ver != 3
        or backend.use_mla
        or backend.has_local_attention
        or backend.is_prefill_aware_swa
        or backend.is_encoder_decoder
        or backend.attn_cp_size != 1
        or translates
    )


def _is_plain_flashinfer(backend: Any) -> bool:
    translates = current().has_kv_index_translator and _translates(backend)
    return not (backend.enable_mis or backend.is_dllm_model or translates)


def _translates(backend: Any) -> bool:
    return bool(backend.kv_index_translator.is_translating)


# Whether a back end only attends to the slots that the request table names.
PLAIN: dict[str, Callable[[Any], bool]] = {
    TRITON: _is_plain_triton,
    FLASH_ATTENTION: _is_plain_flash_attention,
    FLASHINFER: _is_plain_flashinfer,
}


def without_metadata(native: Callable[..., None], attention: BlockAttention) -> Callable[..., None]:
    """The function that fills a captured pass's metadata, left out where nothing reads these.

    Args:
        native: the back end's own.
        attention: of the same back end; ``draft_attention`` does not read the metadata.
    """

    @wraps(native)
    def fill(forward_batch: ForwardBatchLike, *args: Any, **kwargs: Any) -> None:
        captures = bool(kwargs.get("in_capture", args[0] if args else False))
        verifies, rows = forward_batch.forward_mode.is_target_verify(), 0
        if attention.max_rows is not None and verifies and not captures:
            rows = forward_batch.spec_info.ragged_verify_layout.graph_num_tokens
        ours = verifies and attention.replaces(forward_batch.batch_size, rows)
        if captures or not ours:
            native(forward_batch, *args, **kwargs)

    return fill


def routed(native: Callable[..., Tensor], attention: BlockAttention) -> Callable[..., Tensor]:
    """``forward_extend`` of a back end, with ``draft_attention`` where it gives the same result.

    Args:
        native: the back end's own ``forward_extend``.
        attention: notes which of the two ran.
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
        usual = usual and all(value is None or value is False for value in more.values())
        usual = usual and forward_batch._attn_output is None
        small = attention.takes(forward_batch.seq_lens.shape[0], q.shape[0])
        ours = verifies and small and usual and _takes(attention, layer, forward_batch, q)
        attention.refused |= verifies and small and not ours
        attention.used_ours |= ours
        attention.used_native |= verifies and not ours
        if verifies and not ours:
            _check_native(attention, q, forward_batch)
        if not ours:
            if sinks is not None:
                more["sinks"] = sinks
            return native(q, k, v, layer, forward_batch, save_kv_cache, **more)
        assert k is not None
        assert v is not None
        return attend(attention, q, k, v, layer, forward_batch, sinks)

    return forward_extend


def _check_native(attention: BlockAttention, q: Tensor, forward_batch: ForwardBatchLike) -> None:
    """Refuse a pass that the back end's own attention would lay out wrongly.

    Raises:
        DFlashError: requests have other numbers of rows than the back end takes.
    """
    requests, rows = forward_batch.seq_lens.shape[0], attention.native_rows
    if attention.ragged or (rows is not None and q.shape[0] != rows * requests):
        raise DFlashError(
            "a layer's attention takes blocks of one length only, but adaptive verification gave "
            "requests other numbers of rows: turn adaptive_verification off"
        )


def _takes(attention: BlockAttention, layer: Any, forward_batch: Any, q: Tensor) -> bool:
    """Whether ``attend`` gives the result that the back end would give."""
    heads, kv_heads = layer.tp_q_head_num, layer.tp_k_head_num
    window, kind, blocks = layer.sliding_window_size, _kind(layer), attention.blocks
    # A request has this number of rows, on average.
    rows, rest = divmod(q.shape[0], forward_batch.seq_lens.shape[0])
    max_rows = rows if blocks is None else blocks.max_rows
    return (
        forward_batch.spec_info.custom_mask is None
        and (rest == 0 or blocks is not None)
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
        and q.dtype == attention.pool.dtype
    )


def _kind(layer: Any) -> str:
    return str(layer.attn_type.value)


def attend(
    attention: BlockAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Any,
    forward_batch: ForwardBatchLike,
    sinks: Tensor | None,
) -> Tensor:
    """Attention [T, heads * head_dim] of every request's block behind its context.

    Args:
        attention: holds the pool, the table of requests' slots, and the rows of each request.
        q: [T, heads * head_dim].
        k: [T, kv_heads, head_dim]; the kernel writes it to the pool.
        v: [T, kv_heads, head_dim]; the kernel writes it to the pool.
        layer: SGLang's ``RadixAttention``.
        forward_batch: of the pass; a captured pass reads its tensors again in every replay.
        sinks: [heads], logits that join the softmax without a value, or None.
    """
    pool, blocks = attention.pool, attention.blocks
    window, batch = layer.sliding_window_size, forward_batch.seq_lens.shape[0]
    leading: tuple[int, ...] = (-1,)
    if blocks is None:
        leading = (batch, len(q) // batch)
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
            attention.req_to_token,
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
