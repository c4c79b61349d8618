"""Rows rounded to FP8, each with a scale of its own, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import rounded, row_warps
from dflash_plugin.kernels.fp8_rows import FP8, Fp8Rows, quantize
from dflash_plugin.kernels.language import tl, triton


@triton.jit
def _kernel(x, values, scales, x_stride, width, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, scale = rounded(value, LIMIT)
    tl.store(scales + row, scale)
    tl.store(values + row * width + column, value, mask=inside)


@with_twin
def quantize_rows(x: Tensor) -> Fp8Rows:
    """FP8 rows, scaled so that each row's largest value is FP8's largest.

    Args:
        x: float32, bfloat16 or float16 [T, K] with K at most 65,536; rows may be strided.

    Raises:
        ValueError: x has another shape, or its last dimension is not contiguous.
    """
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[1] > 65_536:
        raise ValueError(
            f"x is {list(x.shape)} with strides {x.stride()}: give contiguous rows [T, K] of at "
            "most 65,536"
        )
    rows, width = x.shape
    values = torch.empty(rows, width, dtype=FP8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows > 0:
        block = triton.next_power_of_2(width)
        _kernel[(rows,)](
            x,
            values,
            scales,
            x.stride(0),
            width,
            LIMIT=torch.finfo(FP8).max,
            BLOCK=block,
            num_warps=row_warps(block),
        )
    return Fp8Rows(values, scales)


def quantize_rows_naive(x: Tensor) -> Fp8Rows:
    """``quantize_rows`` in plain torch."""
    return quantize(x)
