"""Corrections of what vLLM does on a CPU: V1 sampling, new weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from dflash_plugin.vllm.surface import target_modules


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
