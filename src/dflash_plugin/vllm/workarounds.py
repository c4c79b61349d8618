"""Corrections of what vLLM does: replayed graphs; on a CPU, V1 sampling and new weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import Method
from dflash_plugin.vllm.surface import target_modules

# Attribute of vLLM's model state: whether the plugin drafts for its model.
DRAFTS = "dflash_drafts"


def expand_in_place(native: Callable[..., None]) -> Callable[..., None]:
    """``_expand_kernel_impl``, replaced."""
    return expand_kernel


def expand_kernel(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each request's value over its tokens, in place.

    vLLM's own function converts ``output`` to int64 first and fills that copy. The temperatures
    that rejection sampling divides by then stay uninitialized.

    Args:
        output: [num_tokens], written.
        input_val: [batch], any dtype that converts to the output's.
        cu_num_tokens: [batch], ends of the requests' tokens.
        replace_from: input value that is replaced.
        replace_to: output value in its place.
        MAX_NUM_TOKENS: launch bound of the GPU kernel; unused.
    """
    values = input_val.masked_fill(input_val == replace_from, replace_to).to(output.dtype)
    ends = cu_num_tokens.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    expanded = values.repeat_interleave(counts)
    output[: expanded.shape[0]] = expanded


def promise_two_rows(native: Method) -> Method:
    """``DefaultModelState.prepare_attn``, right also where a replayed pass has no drafts.

    FlashAttention 3 is given the schedule of a pass before its graph runs. Where no request has
    more than one row the schedule is laid out otherwise, unless heads have 65 to 128 values
    (``mha_fwd_get_scheduler_metadata`` in hopper/flash_api.cpp), but the graph reads the layout
    that it was captured with, of requests with more rows.
    """

    @wraps(native)
    def prepare_attn(
        self: Any, input_batch: Any, cudagraph_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if cudagraph_mode.name == "FULL" and not kwargs.get("for_capture") and _drafts(self):
            mode = self.vllm_config.compilation_config.cudagraph_mode
            # One row alone has a graph of verify passes, or else one that was captured with it.
            if input_batch.num_tokens_after_padding > 1 or mode.separate_routine():
                rows = input_batch.max_query_len or int(input_batch.num_scheduled_tokens.max())
                input_batch.max_query_len = max(rows, 2)
        return native(self, input_batch, cudagraph_mode, *args, **kwargs)

    return prepare_attn


def _drafts(state: Any) -> bool:
    """Whether the plugin drafts for a model state's model; looked up once."""
    known = vars(state)
    if DRAFTS not in known:
        known[DRAFTS] = drafter_spec(state.vllm_config.speculative_config) is not None
    return bool(known[DRAFTS])


def without_empty_rows(constrain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``apply_sampling_constraints`` that returns logits [0, vocab] unchanged.

    vLLM's own function takes the largest top-k over the rows, and fails where there are none: no
    request of the batch has a draft to verify.
    """

    @wraps(constrain)
    def wrapped(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return constrain(logits, *args, **kwargs) if logits.shape[0] else logits

    return wrapped


def pack_head(target: Any) -> None:
    """Pack a target's head again after new weights.

    vLLM on a CPU multiplies by a packed copy of the head, which stays the old one where the head is
    the embedding: a checkpoint names no weights for it then.

    Args:
        target: the target model.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    _, head = target_modules(target)
    if head is None or head.weight.device.type != "cpu":
        return
    if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
        head.quant_method.process_weights_after_loading(head)
