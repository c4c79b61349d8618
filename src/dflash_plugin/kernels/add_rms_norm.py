"""Residual addition and RMS norm of rows in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.kernels.common import norm_weight, scaled_weight


@triton.jit
def _kernel(
    x,
    residual,
    weight,
    normed,
    total_out,
    x_stride,
    residual_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        total = (total + added.to(tl.float32)).to(DTYPE).to(tl.float32)
        tl.store(total_out + row * width + column, total, mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / width + eps)
    out = total * scale * norm_weight(weight + column, inside, DTYPE, GEMMA)
    tl.store(normed + row * width + column, out, mask=inside)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, gemma: bool = False
) -> tuple[Tensor, Tensor]:
    """RMS norm of ``x + residual``, and the sum itself.

    Args:
        x: float32, bfloat16 or float16 [T, H]; rows may be strided.
        residual: like x, or None for a plain norm.
        weight: [H].
        eps: added to the mean square.
        gemma: multiply by ``1 + weight``.

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
    normed = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    if rows == 0:
        return normed, total
    block = triton.next_power_of_2(width)
    _kernel[(rows,)](
        x,
        residual,
        weight,
        normed,
        total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        width,
        eps,
        BLOCK=block,
        GEMMA=gemma,
        num_warps=max(1, min(16, block // 512)),
    )
    return normed, total


def add_rms_norm_naive(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, gemma: bool = False
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in plain torch."""
    total = x if residual is None else x + residual
    scale = scaled_weight(weight, x.dtype, gemma)
    return F.rms_norm(total, weight.shape, scale, eps), total
