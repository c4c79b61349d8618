"""The noise of drawn tokens in one launch, where torch takes two hundred."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import uniform
from dflash_plugin.kernels.language import tl, triton


class Stream(IntEnum):
    """Independent random streams of one request."""

    DRAFT = 0
    ACCEPT = 1
    NEXT = 2


@triton.jit
def _kernel(
    seeds,
    positions,
    out,
    size,
    columns,
    seed_stride,
    row_stride,
    column_stride,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    row, column = index // columns, index % columns
    seed = tl.load(seeds + row * seed_stride, mask=inside, other=0)
    at = positions + row * row_stride + column * column_stride
    position = tl.load(at, mask=inside, other=0)
    tl.store(out + index, uniform(seed, position, STREAM), mask=inside)


@with_twin
def uniforms(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """Noise keyed by request, token position and stream, and by nothing else.

    Args:
        seed: int64 [B].
        position: int64 [B, T], absolute position of the token that is drawn or judged.
        stream: a ``Stream``.

    Returns:
        float64 [B, T] in [0, 1).

    Raises:
        ValueError: shapes or dtypes do not fit.
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
            seed.stride(0),
            *position.stride(),
            STREAM=int(stream),
            BLOCK=128,
            num_warps=4,
        )
    return out


def _check(seed: Tensor, position: Tensor) -> None:
    if position.dim() != 2 or seed.shape != position.shape[:1]:
        raise ValueError("seed must be [B] and position [B, T]")
    for name, part in (("seed", seed), ("position", position)):
        if part.dtype != torch.int64:
            raise ValueError(f"{name} must be int64")


_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * x`` for 32-bit values held in int64."""
    low_half = constant * (x & 0xFFFF)
    high_half = constant * (x >> 16)
    total = (low_half >> 16) + high_half
    return total >> 16, ((total & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 on 32-bit values held in int64 (Salmon et al., SC 2011).

    Args:
        counter: four tensors of one shape.
        key: two tensors that broadcast with them.

    Returns:
        Four tensors of 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_PHILOX_M[0], c0)
        high1, low1 = _multiply(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W[0]) & _LOW, (k1 + _PHILOX_W[1]) & _LOW
    return c0, c1, c2, c3


def uniforms_naive(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """``uniforms`` in plain torch."""
    _check(seed, position)
    key = ((seed & _LOW)[:, None], ((seed >> 32) & _LOW)[:, None])
    zero = torch.zeros_like(position)
    counter = (position & _LOW, (position >> 32) & _LOW, zero + int(stream), zero)
    first, second, _, _ = philox(counter, key)
    return ((first >> 6) * (1 << 27) + (second >> 5)).double() / float(1 << 53)
