"""A linear whose weight is FP8 with one scale a row.

Few rows wait for the weights, which are read as they are and multiplied in the rows' own dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.fp8 import FP8, Fp8Weight, linear_naive
from dflash_plugin.kernels.common import ProductTile, dot, dot_precision


@triton.jit
def _kernel(
    x,
    weight,
    scales,
    bias,
    out,
    rows,
    columns,
    width,
    x_stride,
    weight_stride,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    # Programs that share weights run next to each other.
    row = (tl.program_id(0) % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) // row_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row = row < rows
    is_column = column < columns
    depth = tl.arange(0, BLOCK_WIDTH)
    # Weights stand on the left, where Hopper's products take registers: what was converted there
    # need not go back to shared memory.
    w_at = weight + column.to(tl.int64)[:, None] * weight_stride + depth[None, :]
    x_at = x + row.to(tl.int64)[None, :] * x_stride + depth[:, None]
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = depth < width - start
        left = tl.load(w_at + start, mask=is_column[:, None] & inside[None, :], other=0.0)
        right = tl.load(x_at + start, mask=inside[:, None] & is_row[None, :], other=0.0)
        total = dot(left.to(right.dtype), right, total, PRECISION)
    total *= tl.load(scales + column, mask=is_column, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
    out_at = out + row.to(tl.int64)[None, :] * columns + column[:, None]
    tl.store(out_at, total, mask=is_column[:, None] & is_row[None, :])


def _tile(rows: int, columns: int, width: int) -> ProductTile:
    """A tile for T rows; narrow where that keeps every multiprocessor at work."""
    depth = min(128, max(32, triton.next_power_of_2(width)))
    if rows <= 16:
        return ProductTile(16, 32 if columns <= 8192 else 64, depth, 4, 6)
    if rows <= 64:
        return ProductTile(64, 64, depth, 4, 5)
    return ProductTile(128, 128, min(64, depth), 8, 4)


def fp8_linear(
    x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, *, tile: ProductTile | None = None
) -> Tensor:
    """``x @ (values * scales).T + bias``, summed in float32 and rounded once.

    Args:
        x: float32, bfloat16 or float16 [..., K], last dimension contiguous.
        weight: of N rows.
        bias: [N], or None.
        tile: None chooses one by the number of rows.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    rows, width = flat.shape
    columns = weight.values.shape[0]
    tile = tile or _tile(rows, columns, width)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if rows > 0:
        _kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
            flat,
            weight.values,
            weight.scales,
            bias,
            out,
            rows,
            columns,
            width,
            flat.stride(0),
            weight.values.stride(0),
            PRECISION=dot_precision(x.dtype),
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            BLOCK_WIDTH=tile.width,
            num_warps=tile.warps,
            num_stages=tile.stages_that_fit(flat, weight.values),
        )
    return out.view(*x.shape[:-1], columns)


def _check(x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> None:
    columns = weight.values.shape[0]
    if weight.values.dtype != FP8 or weight.values.shape != (columns, x.shape[-1]):
        raise ValueError(f"values must be float8_e4m3fn [N, {x.shape[-1]}]")
    if weight.scales.shape != (columns,) or weight.scales.dtype != torch.float32:
        raise ValueError(f"scales must be float32 [{columns}]")
    if x.stride(-1) != 1 or weight.values.stride(1) != 1:
        raise ValueError("the last dimensions of x and values must be contiguous")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias must be [{columns}]")


def fp8_linear_naive(
    x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, *, tile: ProductTile | None = None
) -> Tensor:
    """``fp8_linear`` in plain torch."""
    _check(x, weight, bias)
    return linear_naive(x, weight, bias)
