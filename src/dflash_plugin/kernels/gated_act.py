"""Gated activation of a merged gate and up projection in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024


@triton.jit
def _kernel(gate_up, out, row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    # Torch rounds the activation before it multiplies.
    active = (gate / (1.0 + tl.exp(-gate))).to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, active * up, mask=inside)


def gated_act(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate_up: float32, bfloat16 or float16 [T, 2 * I], gate then up; rows may be strided.

    Returns:
        [T, I] in the same dtype; the activation is computed in float32 and rounded before the
        product.

    Raises:
        ValueError: the width is odd, or the last dimension is not contiguous.
    """
    rows, both = gate_up.shape
    if both % 2 or gate_up.stride(1) != 1:
        raise ValueError("gate_up must be [T, 2 * I] with a contiguous last dimension")
    width = both // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows > 0:
        grid = (rows, triton.cdiv(width, BLOCK))
        _kernel[grid](gate_up, out, gate_up.stride(0), width, BLOCK=BLOCK, num_warps=4)
    return out


def gated_act_naive(gate_up: Tensor) -> Tensor:
    """``gated_act`` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
