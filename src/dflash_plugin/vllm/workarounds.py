"""Mended parts of vLLM's V1 sampling, which serves on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor


def expand_kernel(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each request's value over its tokens, in place.

    vLLM's own converts ``output`` to int64 first and fills the copy, so that the temperatures that
    rejection sampling divides by stay uninitialized.

    Args:
        output: [num_tokens], written.
        input_val: [batch], any dtype that converts to the output's.
        cu_num_tokens: [batch], ends of the requests' tokens.
        replace_from, replace_to: a value of the input and what stands for it in the output.
        MAX_NUM_TOKENS: a launch bound of the GPU kernel.
    """
    values = input_val.masked_fill(input_val == replace_from, replace_to).to(output.dtype)
    ends = cu_num_tokens.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    expanded = values.repeat_interleave(counts)
    output[: expanded.shape[0]] = expanded


def without_empty_rows(constrain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``apply_sampling_constraints`` that leaves logits [0, vocab] alone.

    vLLM's takes the largest top-k over the rows, of which there are none when no request of a
    batch has a draft to verify.
    """

    @wraps(constrain)
    def wrapped(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return constrain(logits, *args, **kwargs) if logits.shape[0] else logits

    return wrapped
