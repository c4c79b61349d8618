"""The noise of drawn tokens in one launch, where torch takes two hundred."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.decoding import sampling
from dflash_plugin.kernels.common import uniform


@triton.jit
def _kernel(seeds, positions, out, size, columns, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    seed = tl.load(seeds + at // columns, mask=inside, other=0)
    position = tl.load(positions + at, mask=inside, other=0)
    tl.store(out + at, uniform(seed, position, STREAM), mask=inside)


def uniforms(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """``sampling.uniforms``: float64 [B, T] in [0, 1).

    Args:
        seed: int64 [B], contiguous.
        position: int64 [B, T], contiguous, of the tokens that are drawn or judged.
        stream: a ``Stream``.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    _check(seed, position)
    out = torch.empty(position.shape, dtype=torch.float64, device=position.device)
    if out.numel():
        _kernel[(triton.cdiv(out.numel(), 128),)](
            seed,
            position,
            out,
            out.numel(),
            position.shape[1],
            STREAM=int(stream),
            BLOCK=128,
            num_warps=4,
        )
    return out


def _check(seed: Tensor, position: Tensor) -> None:
    if position.dim() != 2 or seed.shape != position.shape[:1]:
        raise ValueError("seed must be [B] and position [B, T]")
    for name, part in (("seed", seed), ("position", position)):
        if part.dtype != torch.int64 or not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64")


def uniforms_naive(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """``uniforms`` in plain torch."""
    _check(seed, position)
    return sampling.uniforms(seed, position, stream)
