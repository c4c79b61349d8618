"""What several kernels share: norm and rotation of heads, products and tiles."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.kernels.language import tl, triton

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Programs that fill the 132 multiprocessors of an H200.
PROGRAMS = 264
# With more programs than this, loads wait no less.
ENOUGH_PROGRAMS = 4096


class Tile(NamedTuple):
    """The heads that one program takes, and the powers of two that its loads are padded to."""

    heads: int
    head_dim: int
    half: int
    rest: int
    warps: int

    @classmethod
    def of(cls, heads: int, head_dim: int, half: int) -> Tile:
        """A tile for at most ``heads`` heads whose leading ``2 * half`` values turn."""
        padded = triton.next_power_of_2(head_dim)
        # 8 values a thread: one load of 16 bytes.
        count = min(triton.next_power_of_2(heads), max(1, 1024 // padded))
        rest = head_dim - 2 * half
        return cls(
            heads=count,
            head_dim=padded,
            half=triton.next_power_of_2(half),
            rest=triton.next_power_of_2(rest) if rest else 0,
            warps=max(1, min(4, count * padded // 256)),
        )


class NormRope(NamedTuple):
    """How a drafter norms and rotates heads; the norm's weights are given apart.

    Attributes:
        inverse_frequencies: float32 [rotary_dim / 2], contiguous; values of a head past
            ``rotary_dim`` are not rotated.
        eps: added to the mean square.
        gemma: multiply by ``1 + weight``.
        interleaved: rotate neighboring pairs, not the two halves.
        factor: on cosines and sines.
    """

    inverse_frequencies: Tensor
    eps: float
    gemma: bool = False
    interleaved: bool = False
    factor: float = 1.0


def check_rotary(positions: Tensor, inverse_frequencies: Tensor, rows: int, head_dim: int) -> None:
    """Raise ValueError unless positions are int64 [rows] and frequencies float32 that fit."""
    if positions.shape != (rows,) or positions.dtype != torch.int64:
        raise ValueError(f"positions must be int64 [{rows}]")
    half = inverse_frequencies.numel()
    if inverse_frequencies.shape != (half,) or inverse_frequencies.dtype != torch.float32:
        raise ValueError("inverse_frequencies must be float32 [rotary_dim / 2]")
    if not 0 < 2 * half <= head_dim:
        raise ValueError(f"{half} inverse frequencies do not fit head_dim {head_dim}")
    if not positions.is_contiguous() or not inverse_frequencies.is_contiguous():
        raise ValueError("positions and inverse_frequencies must be contiguous")


def scaled_weight(weight: Tensor, dtype: torch.dtype, gemma: bool) -> Tensor:
    """What the norm multiplies by, in ``dtype``."""
    return (1.0 + weight if gemma else weight).to(dtype)


def norm_rotate_naive(x: Tensor, positions: Tensor, weight: Tensor | None, how: NormRope) -> Tensor:
    """Norm and rotation, float32, of heads x [T, heads, head_dim] at positions [T].

    A weight of None leaves out the norm.
    """
    inverse_frequencies, eps, gemma, interleaved, factor = how
    if weight is not None:
        x = F.rms_norm(x, weight.shape, scaled_weight(weight, x.dtype, gemma), eps)
    angles = positions[:, None, None].float() * inverse_frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    turned, rest = x.float().tensor_split([2 * inverse_frequencies.numel()], dim=-1)
    pairs = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    halves = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(halves, dim=-1 if interleaved else -2).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


@triton.jit
def norm_weight(pointers, mask, DTYPE: tl.constexpr, GEMMA: tl.constexpr):
    """Norm weights, float32, rounded as ``scaled_weight`` rounds them to ``DTYPE``."""
    weight = tl.load(pointers, mask=mask, other=0.0)
    if GEMMA:
        # The core adds in the weight's dtype, so the sum is rounded to it.
        weight = (1.0 + weight.to(tl.float32)).to(weight.dtype)
    return weight.to(DTYPE).to(tl.float32)


@triton.jit
def normed(x, scale, weight, at, mask, DTYPE: tl.constexpr, GEMMA: tl.constexpr):
    """x [heads, n] times scale [heads, 1] and the weights at [1, n], rounded to ``DTYPE``."""
    x = x * scale * norm_weight(weight + at, mask, DTYPE, GEMMA)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def fitted(value, divisor, LIMIT: tl.constexpr):
    """``value / divisor`` within ``LIMIT``; None leaves out either."""
    if divisor is not None:
        value = value / divisor
    if LIMIT is not None:
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    return value


def row_warps(block: int) -> int:
    """Warps of a program that holds a row padded to ``block``."""
    return max(1, min(16, block // 512))


@triton.jit
def rounded(row, LIMIT: tl.constexpr):
    """A row of any shape, divided by a scale that makes its largest value ``LIMIT``; the scale."""
    largest = tl.max(tl.abs(row))
    scale = tl.where(largest > 0, largest / LIMIT, 1.0)
    return tl.minimum(tl.maximum(row / scale, -LIMIT), LIMIT), scale


def tiles_each(rows: int, tiles: int) -> int:
    """Tiles of a row that one program takes; with many rows all, which share cosines and sines."""
    return max(1, min(tiles, rows * tiles // ENOUGH_PROGRAMS))


@triton.jit
def turns(position, inverse_frequencies, factor, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Cosines and sines [1, BLOCK_HALF], float32, of a position."""
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    frequency = tl.load(inverse_frequencies + pair, mask=pair < HALF, other=0.0)
    angle = position.to(tl.float32) * frequency
    return tl.cos(angle) * factor, tl.sin(angle) * factor


@triton.jit
def norm_rotate(
    source,
    target,
    alive,
    cos,
    sin,
    weight,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    GEMMA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    divisor=None,
    LIMIT: tl.constexpr = None,
):
    """Write ``norm_rotate_naive`` of the heads at ``source`` to ``target``.

    ``source`` and ``target`` point at the first value of each head, and ``alive`` masks heads; all
    are [heads, 1]. ``cos`` and ``sin`` come from ``turns``. A weight of None leaves out the norm.
    ``source`` may be ``target``, since each value is loaded and stored through the same tensor.
    ``divisor`` and ``LIMIT`` as in ``fitted``.
    """
    DTYPE: tl.constexpr = source.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    if INTERLEAVED:
        first_at = 2 * pair
        second_at = 2 * pair + 1
    else:
        first_at = pair
        second_at = pair + HALF
    is_pair = pair < HALF
    first = tl.load(source + first_at, mask=alive & is_pair, other=0.0).to(tl.float32)
    second = tl.load(source + second_at, mask=alive & is_pair, other=0.0).to(tl.float32)
    if BLOCK_REST > 0:
        rest_at = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        is_rest = rest_at < HEAD_DIM
        rest = tl.load(source + rest_at, mask=alive & is_rest, other=0.0).to(tl.float32)

    if weight is not None:
        squares = tl.sum(first * first + second * second, axis=1)
        if BLOCK_REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first = normed(first, scale, weight, first_at, is_pair, DTYPE, GEMMA)
        second = normed(second, scale, weight, second_at, is_pair, DTYPE, GEMMA)
        if BLOCK_REST > 0:
            rest = normed(rest, scale, weight, rest_at, is_rest, DTYPE, GEMMA)

    turned = fitted(first * cos - second * sin, divisor, LIMIT)
    tl.store(target + first_at, turned, mask=alive & is_pair)
    turned = fitted(second * cos + first * sin, divisor, LIMIT)
    tl.store(target + second_at, turned, mask=alive & is_pair)
    if BLOCK_REST > 0:
        tl.store(target + rest_at, fitted(rest, divisor, LIMIT), mask=alive & is_rest)


@triton.jit
def copy_scaled(
    source,
    target,
    alive,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
    divisor=None,
    LIMIT: tl.constexpr = None,
):
    """Write heads at ``source`` [heads, 1] to ``target``, times ``scale`` if it is not None.

    ``divisor`` and ``LIMIT`` as in ``fitted``.
    """
    at = tl.arange(0, BLOCK_HEAD_DIM)[None, :]
    mask = alive & (at < HEAD_DIM)
    value = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        value = value * scale
    tl.store(target + at, fitted(value, divisor, LIMIT), mask=mask)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 227 << 10
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, one each; an H100's number where there is no GPU."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class ProductTile(NamedTuple):
    """A program's part of a matrix product: rows of x, rows of the weight, width of a step."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int

    def stages_that_fit(self, x: Tensor, weight: Tensor) -> int:
        """Loads in flight, at most ``stages``, beside 32 KiB for the end of a program."""
        stage_bytes = self.width * (self.rows * x.itemsize + self.columns * weight.itemsize)
        return stages_that_fit(self.stages, stage_bytes, 32 << 10, x.device)


def stages_that_fit(stages: int, stage_bytes: int, other_bytes: int, device: torch.device) -> int:
    """Loads in flight, at most ``stages``, that shared memory holds beside other bytes."""
    return max(1, min(stages, (_shared_memory(device) - other_bytes) // stage_bytes))


@triton.jit
def uniform(seed, position, STREAM: tl.constexpr):
    """``uniforms_naive``, float64, of seeds and positions of one shape."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = (position * 0).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, (position * 0 + STREAM).to(tl.uint32), zero)
    high_bits = (first >> 6).to(tl.int64) * (1 << 27)
    return (high_bits + (second >> 5).to(tl.int64)).to(tl.float64) * (1.0 / (1 << 53))


def dot_precision(dtype: torch.dtype) -> str:
    """How ``dot`` multiplies: float32 without rounding to TF32, the others as they are."""
    if dtype == torch.float32:
        return "ieee"
    # Triton's interpreter multiplies the bit patterns of bfloat16.
    return "upcast" if os.environ.get("TRITON_INTERPRET") == "1" else "tf32"


@triton.jit
def dot(x, y, total, PRECISION: tl.constexpr):
    """``total + x @ y`` in float32."""
    if PRECISION == "upcast":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    return tl.dot(x, y, total, input_precision=PRECISION)


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Options that let a launch begin before the launch in front of it has ended, else none.

    Such a kernel calls ``gdc_wait`` before it reads what others write. This is CUDA's programmatic
    dependent launch, from compute capability 9.0.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    return {"launch_pdl": True} if torch.cuda.get_device_capability(device) >= (9, 0) else {}


def most_registers(count: int) -> dict[str, int]:
    """Options that let a launch's threads take no more registers than these, else none.

    With fewer of them more blocks run on a multiprocessor at a time. A power of two, on NVIDIA.
    """
    return {"maxnreg": count} if torch.version.hip is None else {}
