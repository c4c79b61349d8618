"""The best token of each row of logits with its normaliser, in one reading."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.kernels.common import DTYPES
from dflash_plugin.kernels.draft_head import HeadChoice


@triton.jit
def _kernel(
    logits,
    tokens,
    values,
    log_sum_exp,
    count,
    row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    # Each lane keeps its own best and sum, which are joined once at the end.
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    token = tl.zeros((BLOCK,), dtype=tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        at = start + column
        value = tl.load(logits + row * row_stride + at, mask=at < count, other=float("-inf"))
        value = value.to(tl.float32)
        higher = value > best
        top = tl.where(higher, value, best)
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(best - base) + tl.exp(value - base)
        token = tl.where(higher, at, token)
        best = top
    highest = tl.max(best, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    whole = tl.sum(total * tl.exp(best - base), axis=0)
    first = tl.min(tl.where(best == highest, token, count), axis=0)
    tl.store(tokens + row, first.to(tl.int64))
    tl.store(values + row, highest)
    tl.store(log_sum_exp + row, base + tl.log(whole))


def row_choice(logits: Tensor) -> HeadChoice:
    """The likeliest token of each row, the first of equal ones, in one launch.

    Args:
        logits: float32, bfloat16 or float16 [T, V], contiguous rows; V is at least 1.

    Raises:
        ValueError: shape, dtype or strides do not fit.
    """
    rows, count = _check(logits)
    tokens = torch.empty(rows, 1, dtype=torch.int64, device=logits.device)
    values, normaliser = torch.empty(2, rows, device=logits.device).unbind()
    if rows:
        _kernel[(rows,)](
            logits,
            tokens,
            values,
            normaliser,
            count,
            logits.stride(0),
            BLOCK=min(4096, triton.next_power_of_2(count)),
            num_warps=8,
        )
    return HeadChoice(tokens, values[:, None], values[:, None], normaliser)


def _check(logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or logits.shape[1] == 0 or (logits.numel() and logits.stride(1) != 1):
        raise ValueError(f"logits are {tuple(logits.shape)}: give [T, V] with contiguous rows")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits are {logits.dtype}: give one of float32, bfloat16, float16")
    rows, count = logits.shape
    return rows, count


def row_choice_naive(logits: Tensor) -> HeadChoice:
    """``row_choice`` in plain torch."""
    _check(logits)
    wide = logits.float()
    best = wide.max(dim=-1, keepdim=True).values
    tokens = (wide == best).int().argmax(dim=-1, keepdim=True)
    return HeadChoice(tokens, best, best, wide.logsumexp(dim=-1))
