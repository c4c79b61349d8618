"""Gated activation of a merged gate and up projection in one launch, in FP8 where wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import rounded, row_warps
from dflash_plugin.kernels.fp8_rows import FP8, RoundedRows, round_rows
from dflash_plugin.kernels.language import tl, triton

BLOCK = 1024


@triton.jit
def _kernel(gate_up, out, scales, row_stride, width, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    # Torch rounds the activation before it multiplies.
    active = (gate / (1.0 + tl.exp(-gate))).to(gate_up.dtype.element_ty).to(tl.float32)
    product = active * up
    if scales is not None:  # One program has the whole row.
        product, scale = rounded(product.to(gate_up.dtype.element_ty).to(tl.float32), LIMIT)
        tl.store(scales + row, scale)
    tl.store(out + row * width + column, product, mask=inside)


@with_twin
def gated_act(gate_up: Tensor, rounds: bool = False) -> Tensor | RoundedRows:
    """``silu(gate) * up``.

    Args:
        gate_up: float32, bfloat16 or float16 [T, 2 * I], gate then up; rows may be strided.
        rounds: give FP8 rows, rounded from that dtype; I is at most 65,536.

    Returns:
        [T, I] in the same dtype; the activation is computed in float32 and rounded before the
        product.

    Raises:
        ValueError: the width is odd or too large, or the last dimension is not contiguous.
    """
    rows, both = gate_up.shape
    if both % 2 or gate_up.stride(1) != 1:
        raise ValueError("gate_up must be [T, 2 * I] with a contiguous last dimension")
    width, device = both // 2, gate_up.device
    if rounds and width > 65_536:
        raise ValueError(f"rows of {width} are rounded in one program: give at most 65,536")
    out = torch.empty(rows, width, dtype=FP8 if rounds else gate_up.dtype, device=device)
    scales = torch.empty(rows, device=device) if rounds else None
    if rows > 0:
        block = triton.next_power_of_2(width) if rounds else BLOCK
        _kernel[rows, triton.cdiv(width, block)](
            gate_up,
            out,
            scales,
            gate_up.stride(0),
            width,
            LIMIT=torch.finfo(FP8).max,
            BLOCK=block,
            num_warps=row_warps(block) if rounds else 4,
        )
    return out if scales is None else RoundedRows(out, scales, gate_up.dtype)


def gated_act_naive(gate_up: Tensor, rounds: bool = False) -> Tensor | RoundedRows:
    """``gated_act`` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    product = F.silu(gate) * up
    return round_rows(product) if rounds else product
