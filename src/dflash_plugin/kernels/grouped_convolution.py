"""The convolutions of a DFlash 2 drafter in one launch, rounded to FP8 where that is wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.drafter import convolution
from dflash_plugin.kernels.common import rounded, row_warps
from dflash_plugin.kernels.fp8_rows import FP8, RoundedRows, round_rows

BLOCK = 1024


@triton.jit
def convolved(
    x,
    dynamic,
    base,
    row,
    column,
    inside,
    x_stride,
    dynamic_stride,
    width,
    block_size,
    TAPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``convolution.grouped_convolution`` of a row at ``column``, float32, not rounded."""
    place = row % block_size
    at = dynamic + row * dynamic_stride + column // GROUP
    total = column * 0.0
    for tap in tl.static_range(TAPS):
        weight = tl.load(base + tap * width + column, mask=inside, other=0.0).to(tl.float32)
        weight += tl.load(at + tap * (width // GROUP), mask=inside, other=0.0).to(tl.float32)
        # Nothing of what lies before the block.
        seen = column < tl.where(place >= tap, width, 0)
        value = tl.load(x + (row - tap) * x_stride + column, mask=seen, other=0.0)
        total += weight * value.to(tl.float32)
    return total


@triton.jit
def _kernel(
    x,
    dynamic,
    base,
    out,
    scales,
    x_stride,
    dynamic_stride,
    width,
    block_size,
    TAPS: tl.constexpr,
    GROUP: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = convolved(
        x, dynamic, base, row, column, inside, x_stride, dynamic_stride, width, block_size,
        TAPS, GROUP,
    )  # fmt: skip
    if scales is not None:  # One program has the whole row.
        total, scale = rounded(total.to(x.dtype.element_ty).to(tl.float32), LIMIT)
        tl.store(scales + row, scale)
    tl.store(out + row * width + column, total, mask=inside)


def grouped_convolution(
    x: Tensor, dynamic: Tensor, base: Tensor, block_size: int, rounds: bool = False
) -> Tensor | RoundedRows:
    """``convolution.grouped_convolution`` of rows.

    Args:
        x: float32, bfloat16 or float16 [T, H], blocks of ``block_size`` rows one after the other;
            rows may be strided.
        dynamic: [T, taps, groups]; rows may be strided.
        base: [taps, H], contiguous.
        block_size: rows of a block; the last may be shorter.
        rounds: give FP8 rows, rounded from x's dtype; H is at most 65,536.

    Returns:
        [T, H] in x's dtype, summed in float32 and rounded once.

    Raises:
        ValueError: shapes do not fit or memory is not laid out so.
    """
    (rows, width), (taps, groups) = x.shape, check_convolution(x, dynamic, base, block_size)
    if rounds and width > 65_536:
        raise ValueError(f"rows of {width} are rounded in one program: give at most 65,536")
    out = torch.empty(rows, width, dtype=FP8 if rounds else x.dtype, device=x.device)
    scales = torch.empty(rows, device=x.device) if rounds else None
    if rows > 0:
        block = triton.next_power_of_2(width) if rounds else BLOCK
        _kernel[rows, triton.cdiv(width, block)](
            x,
            dynamic,
            base,
            out,
            scales,
            x.stride(0),
            dynamic.stride(0),
            width,
            block_size,
            TAPS=taps,
            GROUP=width // groups,
            LIMIT=torch.finfo(FP8).max,
            BLOCK=block,
            num_warps=row_warps(block) if rounds else 4,
        )
    return out if scales is None else RoundedRows(out, scales, x.dtype)


def check_convolution(x: Tensor, dynamic: Tensor, base: Tensor, block_size: int) -> tuple[int, int]:
    """Taps and groups; raise ValueError unless x [T, H] can be convolved with them."""
    (rows, width), (taps, groups) = x.shape, dynamic.shape[-2:]
    if x.stride(1) != 1:
        raise ValueError("the last dimension of x must be contiguous")
    if dynamic.shape != (rows, taps, groups) or width % groups:
        raise ValueError(
            f"dynamic is {list(dynamic.shape)}, not [{rows}, taps, groups] with groups that divide "
            f"{width}"
        )
    if dynamic.stride(2) != 1 or dynamic.stride(1) != groups:
        raise ValueError("the taps and groups of a row of dynamic must be contiguous")
    if base.shape != (taps, width) or not base.is_contiguous():
        raise ValueError(f"base must be contiguous [{taps}, {width}]")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: give 1 or more")
    return taps, groups


def grouped_convolution_naive(
    x: Tensor, dynamic: Tensor, base: Tensor, block_size: int, rounds: bool = False
) -> Tensor | RoundedRows:
    """``grouped_convolution`` in plain torch."""
    check_convolution(x, dynamic, base, block_size)
    out = convolution.grouped_convolution(x, dynamic, base, block_size)
    return round_rows(out) if rounds else out
