"""Residual addition and RMS norm of rows in one launch, rounded to FP8 where that is wanted.

A DFlash 2 drafter convolves what is added, in the same launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import norm_weight, overlap, rounded, row_warps, scaled_weight
from dflash_plugin.kernels.fp8_rows import FP8, RoundedRows, round_rows
from dflash_plugin.kernels.grouped_convolution import (
    check_convolution,
    convolve_naive,
    convolved,
)
from dflash_plugin.kernels.language import gdc_launch_dependents, tl, triton


class Convolution(NamedTuple):
    """What rows are convolved with before they are added, see ``grouped_convolution``.

    Attributes:
        dynamic: [T, taps, groups].
        base: [taps, H].
        block_size: rows of a block.
    """

    dynamic: Tensor
    base: Tensor
    block_size: int


@triton.jit
def _kernel(
    x,
    residual,
    dynamic,
    base,
    weight,
    normed,
    scales,
    total_out,
    x_stride,
    residual_stride,
    dynamic_stride,
    width,
    block_size,
    eps,
    TAPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if dynamic is None:
        total = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    else:
        total = convolved(
            x, dynamic, base, row, column, inside, x_stride, dynamic_stride, width, block_size,
            TAPS, GROUP,
        ).to(DTYPE).to(tl.float32)  # fmt: skip
    if residual is not None:
        added = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        total = (total + added.to(tl.float32)).to(DTYPE).to(tl.float32)
        tl.store(total_out + row * width + column, total, mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / width + eps)
    out = total * scale * norm_weight(weight + column, inside, DTYPE, GEMMA)
    if scales is not None:
        out, divisor = rounded(out.to(DTYPE).to(tl.float32), LIMIT)
        tl.store(scales + row, divisor)
    tl.store(normed + row * width + column, out, mask=inside)


@with_twin
def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    gemma: bool = False,
    rounds: bool = False,
    convolved_with: Convolution | None = None,
) -> tuple[Tensor | RoundedRows, Tensor]:
    """RMS norm of ``x + residual``, and the sum itself.

    Args:
        x: float32, bfloat16 or float16 [T, H]; rows may be strided.
        residual: like x, or None for a plain norm.
        weight: [H].
        eps: added to the mean square.
        gemma: multiply by ``1 + weight``.
        rounds: give the norm as FP8 rows, rounded from x's dtype.
        convolved_with: x is convolved first, and rounded; takes a residual.

    Returns:
        The norm, computed in float32, and the sum, both [T, H] in x's dtype. The sum is x itself
        where there is no residual.

    Raises:
        ValueError: shapes or dtypes do not fit, or the last dimension is not contiguous.
    """
    rows, width = x.shape
    if weight.shape != (width,) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{width}]")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError("residual must have x's shape and dtype")
    if x.stride(1) != 1 or (residual is not None and residual.stride(1) != 1):
        raise ValueError("the last dimension must be contiguous")
    taps = groups = 1
    if convolved_with is not None:
        if residual is None:
            raise ValueError("a convolution takes a residual")
        taps, groups = check_convolution(x, *convolved_with)
    dynamic, base, block_size = convolved_with or (None, None, 0)
    normed = torch.empty(rows, width, dtype=FP8 if rounds else x.dtype, device=x.device)
    scales = torch.empty(rows, device=x.device) if rounds else None
    total = x if residual is None else torch.empty(rows, width, dtype=x.dtype, device=x.device)
    out = normed if scales is None else RoundedRows(normed, scales, x.dtype)
    if rows == 0:
        return out, total
    block = triton.next_power_of_2(width)
    _kernel[(rows,)](
        x,
        residual,
        dynamic,
        base,
        weight,
        normed,
        scales,
        total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0 if dynamic is None else dynamic.stride(0),
        width,
        block_size,
        eps,
        TAPS=taps,
        GROUP=width // groups,
        BLOCK=block,
        GEMMA=gemma,
        LIMIT=torch.finfo(FP8).max,
        OVERLAP=bool(overlap(x.device)),
        num_warps=row_warps(block),
    )
    return out, total


def add_rms_norm_naive(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    gemma: bool = False,
    rounds: bool = False,
    convolved_with: Convolution | None = None,
) -> tuple[Tensor | RoundedRows, Tensor]:
    """``add_rms_norm`` in plain torch."""
    if convolved_with is not None:
        x = convolve_naive(x, *convolved_with)
    total = x if residual is None else x + residual
    scale = scaled_weight(weight, x.dtype, gemma)
    normed = F.rms_norm(total, weight.shape, scale, eps)
    return round_rows(normed) if rounds else normed, total
