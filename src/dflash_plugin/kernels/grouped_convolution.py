"""The convolutions of a DFlash 2 drafter in one launch, rounded to FP8 where that is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import rounded, row_warps
from dflash_plugin.kernels.fp8_rows import FP8, RoundedRows, round_rows
from dflash_plugin.kernels.language import tl, triton

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
    """``grouped_convolution_naive`` of a row at ``column``, float32, not rounded."""
    in_block = row % block_size
    at = dynamic + row * dynamic_stride + column // GROUP
    total = column * 0.0
    for tap in tl.static_range(TAPS):
        weight = tl.load(base + tap * width + column, mask=inside, other=0.0).to(tl.float32)
        weight += tl.load(at + tap * (width // GROUP), mask=inside, other=0.0).to(tl.float32)
        # Rows before the block's first count as zero.
        seen = column < tl.where(in_block >= tap, width, 0)
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


@with_twin
def grouped_convolution(
    x: Tensor, dynamic: Tensor, base: Tensor, block_size: int, rounds: bool = False
) -> Tensor | RoundedRows:
    """``out[t, c] = sum_k (base[k, c] + dynamic[t, k, group of c]) * x[t - k, c]``.

    A row's own coefficients weigh the rows before it; rows before its block's first count as zero.

    Args:
        x: float32, bfloat16 or float16 [T, H], blocks of ``block_size`` rows one after the other;
            rows may be strided.
        dynamic: [T, taps, groups]; rows may be strided. A group is ``H / groups`` channels side by
            side.
        base: [taps, H], contiguous.
        block_size: rows of a block; the last may be shorter.
        rounds: return FP8 rows, rounded from x's dtype; H is at most 65,536.

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
    out = convolve_naive(x, dynamic, base, block_size)
    return round_rows(out) if rounds else out


def convolve_naive(x: Tensor, dynamic: Tensor, base: Tensor, block_size: int | Tensor) -> Tensor:
    """``grouped_convolution`` of any number of sequences, for training and for any engine.

    Args:
        x: [..., T, H], blocks of ``block_size`` rows one after the other.
        dynamic: [..., T, taps, groups].
        base: [taps, H].
        block_size: rows of a block; a last block may be shorter. A tensor, int64 of no dimension,
            is not read back to the host.

    Returns:
        [..., T, H] in x's dtype, summed in float32 (of float64, in float64) and rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    taps, groups = dynamic.shape[-2:]
    in_block = torch.arange(x.shape[-2], device=x.device)[:, None] % block_size
    rows = x.to(wide).unflatten(-1, (groups, -1))
    kernel = base.to(wide).unflatten(-1, (groups, -1)) + dynamic.to(wide)[..., None]
    total: Tensor = kernel[..., 0, :, :] * rows
    for tap in range(1, taps):
        earlier = rows.roll(tap, dims=-3).masked_fill((in_block < tap)[..., None], 0.0)
        total = total + kernel[..., tap, :, :] * earlier
    return total.flatten(-2).to(x.dtype)
