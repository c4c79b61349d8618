"""Context rows of the target layers' features, without a copy that puts the layers side by side.

This is the fusion of arXiv 2602.06036, section 4: one linear over all layers' features, and a norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.kernels.add_rms_norm import add_rms_norm, add_rms_norm_naive
from dflash_plugin.kernels.common import DTYPES, ProductTile, dot, dot_precision


@triton.jit(do_not_specialize=["count"])
def _kernel(
    features,
    rows,
    weight,
    out,
    count,
    columns,
    width,
    row_stride,
    weight_stride,
    LAYERS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row_tiles = tl.cdiv(count, BLOCK_ROWS)
    # Programs that share weights run next to each other.
    row = (tl.program_id(0) % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) // row_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    source = row.to(tl.int64)
    is_row = row < count
    if rows is not None:
        source = tl.load(rows + row, mask=is_row, other=-1)
        is_row &= source >= 0
    if tl.max(is_row.to(tl.int32), axis=0) > 0:
        is_column = column < columns
        depth = tl.arange(0, BLOCK_WIDTH)
        x_at = source[:, None] * row_stride + depth[None, :]
        w_at = weight + column.to(tl.int64)[None, :] * weight_stride + depth[:, None]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for layer in tl.static_range(LAYERS):
            for start in range(0, width, BLOCK_WIDTH):
                inside = depth < width - start
                x = tl.load(
                    features[layer] + x_at + start,
                    mask=is_row[:, None] & inside[None, :],
                    other=0.0,
                )
                w = tl.load(
                    w_at + layer * width + start,
                    mask=inside[:, None] & is_column[None, :],
                    other=0.0,
                )
                total = dot(x, w, total, PRECISION)
        out_at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out_at, total, mask=is_row[:, None] & is_column[None, :])


def _tile(rows: int, width: int) -> ProductTile:
    """A tile for T rows; with few of them the weights are shared out over more programs."""
    depth = min(128, max(16, triton.next_power_of_2(width)))
    if rows <= 16:
        return ProductTile(16, 32, depth, 4, 6)
    if rows <= 64:
        return ProductTile(64, 32, depth, 4, 5)
    return ProductTile(128, 128, min(64, depth), 8, 4)


def fuse_features(
    features: Sequence[Tensor],
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    rows: Tensor | None = None,
    gemma: bool = False,
    tile: ProductTile | None = None,
) -> Tensor:
    """Context rows: all layers' features side by side, times ``weight.T``, normed.

    Args:
        features: float32, bfloat16 or float16 [S, width] of each layer, in the order of the
            checkpoint's ``target_layer_ids``; alike in layout, last dimension contiguous.
        weight: [hidden, layers * width], in the features' dtype, last dimension contiguous.
        norm_weight: [hidden].
        eps: added to the mean square.
        rows: int64 [T], which rows of the features to take; those below zero give nothing: their
            results are left unwritten. None takes all S in order.
        gemma: the norm multiplies by ``1 + norm_weight``.
        tile: None chooses one by T.

    Returns:
        [T, hidden] in the features' dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    count, width = _check(features, weight, rows)
    columns, first = weight.shape[0], features[0]
    tile = tile or _tile(count, width)
    out = torch.empty(count, columns, dtype=first.dtype, device=first.device)
    if count > 0:
        _kernel[(triton.cdiv(count, tile.rows) * triton.cdiv(columns, tile.columns),)](
            tuple(features),
            rows,
            weight,
            out,
            count,
            columns,
            width,
            first.stride(0),
            weight.stride(0),
            LAYERS=len(features),
            PRECISION=dot_precision(first.dtype),
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            BLOCK_WIDTH=tile.width,
            num_warps=tile.warps,
            num_stages=tile.stages_that_fit(first, weight),
        )
    return cast(Tensor, add_rms_norm(out, None, norm_weight, eps, gemma)[0])


def _check(features: Sequence[Tensor], weight: Tensor, rows: Tensor | None) -> tuple[int, int]:
    if not features:
        raise ValueError("no layer's features")
    first = features[0]
    for index, layer in enumerate(features):
        alike = layer.shape == first.shape and layer.dtype == first.dtype
        if not alike or layer.stride() != first.stride():
            raise ValueError(
                f"features of layer {index} are {layer.dtype} {list(layer.shape)} with strides "
                f"{layer.stride()}, but of layer 0 {first.dtype} {list(first.shape)} with "
                f"{first.stride()}"
            )
    if first.dim() != 2 or first.stride(1) != 1 or first.dtype not in DTYPES:
        raise ValueError(
            f"features are {first.dtype} {list(first.shape)} with strides {first.stride()}: give "
            "contiguous rows [S, width] of float32, bfloat16 or float16"
        )
    width = first.shape[1]
    joined = len(features) * width
    if weight.shape != (weight.shape[0], joined) or weight.stride(1) != 1:
        raise ValueError(f"weight is {list(weight.shape)}, not contiguous [hidden, {joined}]")
    if weight.dtype != first.dtype:
        raise ValueError(f"weight is {weight.dtype}, the features are {first.dtype}")
    if rows is None:
        return first.shape[0], width
    if rows.dim() != 1 or rows.dtype != torch.int64 or not rows.is_contiguous():
        raise ValueError("rows must be contiguous int64 [T]")
    return rows.shape[0], width


def fuse_features_naive(
    features: Sequence[Tensor],
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    rows: Tensor | None = None,
    gemma: bool = False,
    tile: ProductTile | None = None,
) -> Tensor:
    """``fuse_features`` in plain torch; rows below zero give zeros."""
    _check(features, weight, rows)
    joined = torch.cat(list(features), dim=-1)
    if rows is not None:
        taken = joined[rows.clamp(min=0)]
        joined = taken.masked_fill((rows < 0)[:, None], 0.0)
    fused = F.linear(joined.float(), weight.float()).to(joined.dtype)
    return cast(Tensor, add_rms_norm_naive(fused, None, norm_weight, eps, gemma)[0])
