"""Few FP8 rows times a weight's, which is read as fast as memory gives it.

A library's product is made for many rows: with few, it takes up to half again as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import ProductTile, dot, dot_precision, multiprocessors
from dflash_plugin.kernels.fp8_rows import FP8, Fp8Rows, product_naive
from dflash_plugin.kernels.language import tl, triton

# Of a product that the library does faster.
MANY_ROWS = ProductTile(128, 128, 128, 8, 4)


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    out,
    rows,
    columns,
    width,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row = row < rows
    is_column = column < columns
    depth = tl.arange(0, BLOCK_WIDTH)
    # The weight stands on the left: its rows are as many as a matrix unit wants, x's are few.
    w_at = weight + column.to(tl.int64)[:, None] * width + depth[None, :]
    x_at = x + row[None, :] * width + depth[:, None]
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = depth < width - start
        left = tl.load(w_at + start, mask=is_column[:, None] & inside[None, :], other=0.0)
        right = tl.load(x_at + start, mask=inside[:, None] & is_row[None, :], other=0.0)
        total = dot(left, right, total, PRECISION)
    total *= tl.load(weight_scales + column, mask=is_column, other=0.0)[:, None]
    total *= tl.load(x_scales + row, mask=is_row, other=0.0)[None, :]
    at = row[None, :] * columns + column[:, None]
    tl.store(out + at, total, mask=is_column[:, None] & is_row[None, :])


def best_tile(rows: int, columns: int, device: torch.device) -> ProductTile | None:
    """The fastest tile of those tried on an H200, or None where the library's product is faster.

    What decides is how many programs there are: a weight of few columns leaves multiprocessors idle
    unless x's rows are shared out too.

    Args:
        rows: T of x.
        columns: N of the weight.
        device: of both.
    """
    parts, processors = triton.cdiv(columns, 64), multiprocessors(device)
    is_short, is_long = 2 * parts <= processors, parts >= 2 * processors
    if rows <= 32:
        return ProductTile(max(16, triton.next_power_of_2(rows)), 64, 256, 4, 5)
    if rows <= 64:
        if is_short:
            return ProductTile(32, 64, 256, 4, 7)
        return ProductTile(64, 128, 128, 8, 4) if is_long else ProductTile(64, 64, 256, 4, 5)
    if rows <= 128:
        if is_short:
            return ProductTile(64, 64, 256, 4, 5)
        return ProductTile(128, 64, 128, 8, 5) if parts <= processors else None
    return ProductTile(128, 64, 256, 4, 4) if rows <= 256 and is_short else None


@with_twin
def fp8_product(
    x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype, *, tile: ProductTile | None = None
) -> Tensor:
    """``x @ weight.T`` with both scales, summed in float32 and rounded once.

    Args:
        x: of T rows, values contiguous.
        weight: of N rows, values contiguous.
        dtype: of the result.
        tile: None takes ``best_tile``, or one for many rows where there is none.

    Returns:
        [T, N] in ``dtype``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    rows, columns, width = _check(x, weight)
    out = torch.empty(rows, columns, dtype=dtype, device=x.values.device)
    if rows == 0:
        return out
    tile = tile or best_tile(rows, columns, x.values.device) or MANY_ROWS
    _kernel[triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        out,
        rows,
        columns,
        width,
        PRECISION=dot_precision(FP8),
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_WIDTH=tile.width,
        num_warps=tile.warps,
        num_stages=tile.stages_that_fit(x.values, weight.values),
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
    x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype, *, tile: ProductTile | None = None
) -> Tensor:
    """``fp8_product`` in plain torch."""
    _check(x, weight)
    return product_naive(x, weight, dtype)
