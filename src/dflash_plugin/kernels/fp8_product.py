"""Few FP8 rows times many, with the sum over their width shared out over programs.

A library's product gives each program whole sums, so that a weight with few rows keeps few programs
at work; at few rows of x, time is how fast the weight is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.fp8 import FP8, Fp8Rows, product_naive
from dflash_plugin.kernels.common import PROGRAMS, ProductTile, dot, dot_precision

# Columns of the second launch.
JOINED = 1024


@triton.jit(do_not_specialize=["rows"])
def _part_kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    out,
    rows,
    columns,
    width,
    share,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.program_id(2)
    is_row = row < rows
    is_column = column < columns
    depth = tl.arange(0, BLOCK_WIDTH)
    end = tl.minimum(width, (part + 1) * share)
    # The weight stands on the left: its rows are as many as a matrix unit wants, x's are few.
    w_at = weight + column.to(tl.int64)[:, None] * width + depth[None, :]
    x_at = x + row[None, :] * width + depth[:, None]
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(part * share, end, BLOCK_WIDTH):
        inside = depth < end - start
        left = tl.load(w_at + start, mask=is_column[:, None] & inside[None, :], other=0.0)
        right = tl.load(x_at + start, mask=inside[:, None] & is_row[None, :], other=0.0)
        total = dot(left, right, total, PRECISION)
    at = row[None, :] * columns + column[:, None]
    mask = is_column[:, None] & is_row[None, :]
    if WHOLE:
        total *= tl.load(weight_scales + column, mask=is_column, other=0.0)[:, None]
        total *= tl.load(x_scales + row, mask=is_row, other=0.0)[None, :]
        tl.store(out + at, total, mask=mask)
    else:
        tl.store(out + part.to(tl.int64) * rows * columns + at, total, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _join_kernel(
    parts,
    x_scales,
    weight_scales,
    out,
    rows,
    columns,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row * columns + column
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * rows * columns + at, mask=inside, other=0.0)
    total *= tl.load(weight_scales + column, mask=inside, other=0.0) * tl.load(x_scales + row)
    tl.store(out + at, total, mask=inside)


def _tile(rows: int) -> ProductTile:
    """A tile for T rows."""
    if rows <= 16:
        return ProductTile(16, 64, 256, 4, 5)
    return ProductTile(32 if rows <= 32 else 64, 64, 256, 4, 4)


def _parts(rows: int, columns: int, width: int, tile: ProductTile) -> int:
    """Shares of the width: enough programs, and some loads to each of them."""
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return int(max(1, min(8, PROGRAMS // programs, width // (4 * tile.width))))


def fp8_product(
    x: Fp8Rows,
    weight: Fp8Rows,
    dtype: torch.dtype,
    *,
    tile: ProductTile | None = None,
    parts: int | None = None,
) -> Tensor:
    """``x @ weight.T`` with both scales, summed in float32 and rounded once.

    Args:
        x: of T rows, values contiguous.
        weight: of N rows, values contiguous.
        dtype: of the result.
        tile: None chooses one by T.
        parts: of the width, each a program's; None chooses by the shapes.

    Returns:
        [T, N] in ``dtype``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    rows, columns, width = _check(x, weight)
    out = torch.empty(rows, columns, dtype=dtype, device=x.values.device)
    if rows == 0:
        return out
    tile = tile or _tile(rows)
    count = parts or _parts(rows, columns, width, tile)
    share = triton.cdiv(triton.cdiv(width, tile.width), count) * tile.width
    target = out
    if count > 1:
        target = torch.empty(count, rows, columns, dtype=torch.float32, device=out.device)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns), count)
    _part_kernel[grid](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        target,
        rows,
        columns,
        width,
        share,
        PRECISION=dot_precision(FP8),
        WHOLE=count == 1,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_WIDTH=tile.width,
        num_warps=tile.warps,
        num_stages=tile.stages_that_fit(x.values, weight.values),
    )
    if count > 1:
        _join_kernel[(rows, triton.cdiv(columns, JOINED))](
            target,
            x.scales,
            weight.scales,
            out,
            rows,
            columns,
            PARTS=count,
            BLOCK=JOINED,
            num_warps=4,
        )
    return out


def _check(x: Fp8Rows, weight: Fp8Rows) -> tuple[int, int, int]:
    for name, part in (("x", x), ("weight", weight)):
        count = part.values.shape[0]
        if part.values.dim() != 2 or part.values.dtype != FP8 or not part.values.is_contiguous():
            raise ValueError(f"{name}'s values must be contiguous float8_e4m3fn rows")
        if part.scales.shape != (count,) or part.scales.dtype != torch.float32:
            raise ValueError(f"{name}'s scales must be float32 [{count}]")
    rows, width = x.values.shape
    if weight.values.shape[1] != width:
        raise ValueError(f"weight's rows are {weight.values.shape[1]} wide, x's {width}")
    return rows, weight.values.shape[0], width


def fp8_product_naive(
    x: Fp8Rows,
    weight: Fp8Rows,
    dtype: torch.dtype,
    *,
    tile: ProductTile | None = None,
    parts: int | None = None,
) -> Tensor:
    """``fp8_product`` in plain torch."""
    _check(x, weight)
    return product_naive(x, weight, dtype)
