"""A sublayer's convolution of a DFlash 2 drafter, and the product that its kernels come from.

For few rows, which wait for the product's weight: programs share out its width, ask for their part
before the rows are there, and leave their sums to the convolution. On a GPU that can, each launch
begins while the one before it still runs.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import dot, dot_precision, overlap, rounded, row_warps
from dflash_plugin.kernels.fp8_rows import FP8, RoundedRows, round_rows
from dflash_plugin.kernels.grouped_convolution import BLOCK, convolve_naive
from dflash_plugin.kernels.language import gdc_launch_dependents, gdc_wait, tl, triton

# Rows beyond which a library's product is faster.
FEW_ROWS = 64
# Columns of the product that a program has, and bytes of a row of the weight: the fastest of those
# tried on an H200.
COLUMNS, SHARE_BYTES = 64, 1024
# What a GPU's cache reads at a time.
LINE_BYTES = 128


@triton.jit
def _ask_for(pointers):
    """Have the cache that all programs share read these lines; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], tl.int32, False, 1
    )


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x,
    weight,
    out,
    rows,
    columns,
    width,
    x_stride,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SHARE: tl.constexpr,
    LINE: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = tl.program_id(1) * SHARE
    is_column = column < columns
    if OVERLAP:
        # All of the program's part at once, which its loads then find there.
        line = first + tl.arange(0, SHARE // LINE) * LINE
        lines = column[:, None] * width + line[None, :]
        _ask_for(weight + tl.minimum(lines, columns * width - 1))
        gdc_launch_dependents()
    depth = first + tl.arange(0, SHARE)
    inside = depth < width
    w_at = weight + column[:, None] * width + depth[None, :]
    left = tl.load(w_at, mask=is_column[:, None] & inside[None, :], other=0.0)
    if OVERLAP:
        gdc_wait()
    row = tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    x_at = x + row[None, :] * x_stride + depth[:, None]
    right = tl.load(x_at, mask=inside[:, None] & is_row[None, :], other=0.0)
    zero = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    total = dot(left, right, zero, PRECISION)
    at = (tl.program_id(1) * rows + row)[None, :] * columns + column[:, None]
    tl.store(out + at, total, mask=is_column[:, None] & is_row[None, :])


@triton.jit
def _summed(parts, column, inside, size, SHARES: tl.constexpr, DTYPE: tl.constexpr):
    """A row's product at columns, of the shares' sums behind ``parts``; float32, rounded."""
    total = tl.zeros(column.shape, dtype=tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(parts + share * size + column, mask=inside, other=0.0)
    return total.to(DTYPE).to(tl.float32)


@triton.jit
def _convolution_kernel(
    x,
    parts,
    base,
    out,
    scales,
    after,
    rows,
    width,
    groups,
    block_size,
    x_stride,
    TAPS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARES: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0)
    in_block = row % block_size
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    member = tl.arange(0, BLOCK_GROUP)[None, :]
    is_group = group < groups
    channel = group[:, None] * GROUP + member
    inside = is_group[:, None] & (member < GROUP)
    columns = 2 * TAPS * groups
    if OVERLAP:
        gdc_wait()
    parts += row * columns
    total = tl.zeros((BLOCK_GROUPS, BLOCK_GROUP), dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        column = tap * groups + group
        moving = _summed(parts, column, is_group, rows * columns, SHARES, DTYPE)
        fixed = tl.load(base + tap * width + channel, mask=inside, other=0.0).to(tl.float32)
        # Rows before the block's first count as zero.
        seen = inside & (channel < tl.where(in_block >= tap, width, 0))
        value = tl.load(x + (row - tap) * x_stride + channel, mask=seen, other=0.0)
        total += (fixed + moving[:, None]) * value.to(tl.float32)
        kept = _summed(parts, TAPS * groups + column, is_group, rows * columns, SHARES, DTYPE)
        tl.store(after + (row * TAPS + tap) * groups + group, kept, mask=is_group)
    if scales is not None:  # One program has the whole row.
        total, scale = rounded(total.to(DTYPE).to(tl.float32), LIMIT)
        tl.store(scales + row, scale)
    tl.store(out + row * width + channel, total, mask=inside)


def projects(weight: object, x: Tensor) -> TypeGuard[Tensor]:
    """Whether rows are few and a weight is as it was read, for ``projected_convolution``.

    Args:
        weight: an engine's linear's, which may be quantized or packed.
        x: [T, H].
    """
    return (
        isinstance(weight, Tensor)
        and len(x) <= FEW_ROWS
        and weight.dtype == x.dtype
        and weight.dim() == 2
        and weight.shape[1] == x.shape[1]
        and weight.is_contiguous()
    )


@with_twin
def projected_convolution(
    x: Tensor, weight: Tensor, base: Tensor, block_size: int, rounds: bool = False
) -> tuple[Tensor | RoundedRows, Tensor]:
    """A sublayer's convolved input, and the kernels of its result's convolution.

    Args:
        x: float32, bfloat16 or float16 [T, H], blocks of ``block_size`` rows one after the other;
            rows may be strided.
        weight: [2 * taps * groups, H] in x's dtype, contiguous: ``DynamicConvolution``'s
            ``kernel_projection``, the input's kernels before the result's.
        base: [taps, H], contiguous, the input's.
        block_size: rows of a block; the last may be shorter.
        rounds: give FP8 rows, rounded from x's dtype.

    Returns:
        [T, H], as ``grouped_convolution`` gives it, and [T, taps, groups]. Kernels are summed in
        float32 and rounded once to x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit or memory is not laid out so.
    """
    (rows, width), (taps, groups) = x.shape, _check(x, weight, base, block_size)
    device, columns = x.device, len(weight)
    out = torch.empty(rows, width, dtype=FP8 if rounds else x.dtype, device=device)
    scales = torch.empty(rows, device=device) if rounds else None
    after = torch.empty(rows, taps, groups, dtype=x.dtype, device=device)
    convolved = out if scales is None else RoundedRows(out, scales, x.dtype)
    if rows == 0:
        return convolved, after
    share = min(SHARE_BYTES // x.itemsize, max(16, triton.next_power_of_2(width)))
    shares = triton.cdiv(width, share)
    parts = torch.empty(shares, rows, columns, dtype=torch.float32, device=device)
    overlaps = overlap(device)
    _product_kernel[triton.cdiv(columns, COLUMNS), shares](
        x,
        weight,
        parts,
        rows,
        columns,
        width,
        x.stride(0),
        PRECISION=dot_precision(x.dtype),
        OVERLAP=bool(overlaps),
        BLOCK_ROWS=max(16, triton.next_power_of_2(rows)),
        BLOCK_COLUMNS=COLUMNS,
        SHARE=share,
        LINE=min(share, LINE_BYTES // x.itemsize),
        num_warps=4 if rows <= 16 else 8,
        **overlaps,
    )
    block_group, whole = (triton.next_power_of_2(size) for size in (width // groups, groups))
    # To round a row, a program has all of it.
    block_groups = whole if rounds else min(whole, max(1, BLOCK // block_group))
    _convolution_kernel[rows, triton.cdiv(groups, block_groups)](
        x,
        parts,
        base,
        out,
        scales,
        after,
        rows,
        width,
        groups,
        block_size,
        x.stride(0),
        TAPS=taps,
        GROUP=width // groups,
        SHARES=shares,
        LIMIT=torch.finfo(FP8).max,
        OVERLAP=bool(overlaps),
        BLOCK_GROUPS=block_groups,
        BLOCK_GROUP=block_group,
        num_warps=row_warps(block_groups * block_group) if rounds else 4,
        **overlaps,
    )
    return convolved, after


def _check(x: Tensor, weight: Tensor, base: Tensor, block_size: int) -> tuple[int, int]:
    """Taps and groups."""
    width, taps = x.shape[1], base.shape[0]
    if x.stride(1) != 1:
        raise ValueError("the last dimension of x must be contiguous")
    if base.shape != (taps, width) or not base.is_contiguous():
        raise ValueError(f"base must be contiguous [taps, {width}]")
    groups = len(weight) // (2 * taps)
    if weight.shape != (2 * taps * groups, width) or groups == 0 or width % groups:
        raise ValueError(
            f"weight is {list(weight.shape)}, not [2 * {taps} * groups, {width}] with groups that "
            f"divide {width}"
        )
    if weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous {x.dtype}")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: give 1 or more")
    return taps, groups


def projected_convolution_naive(
    x: Tensor, weight: Tensor, base: Tensor, block_size: int, rounds: bool = False
) -> tuple[Tensor | RoundedRows, Tensor]:
    """``projected_convolution`` in plain torch."""
    taps, groups = _check(x, weight, base, block_size)
    kernels = F.linear(x, weight).unflatten(-1, (2, taps, groups))
    before, after = kernels.unbind(1)
    out = convolve_naive(x, before, base, block_size)
    return round_rows(out) if rounds else out, after.contiguous()
