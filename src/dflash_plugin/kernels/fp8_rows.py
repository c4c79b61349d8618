"""FP8 rows: what kernels and linears exchange, and how rows are rounded, in plain torch.

Each row has a scale of its own, so that its largest value is the largest that FP8 holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
# torch's FP8 product takes matrices whose sides are multiples of this.
STEP = 16


class Fp8Rows(NamedTuple):
    """Quantized rows: ``values * scales[:, None]``.

    Attributes:
        values: float8_e4m3fn [N, K].
        scales: float32 [N].
    """

    values: Tensor
    scales: Tensor

    def rows(self, start: int) -> Fp8Rows:
        """The rows from index ``start`` to the last."""
        return Fp8Rows(self.values[start:], self.scales[start:])


class RoundedRows(NamedTuple):
    """A linear's input that the kernel before it has already rounded.

    Attributes:
        values: float8_e4m3fn [T, K].
        scales: float32 [T], factors of the rows of ``values``.
        dtype: dtype before rounding, and of the linear's output.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def round_rows(x: Tensor) -> RoundedRows:
    """x [T, K], rounded to FP8 rows in plain torch."""
    return RoundedRows(*quantize(x), x.dtype)


def takes_rounded(module: nn.Module) -> bool:
    """Whether a linear accepts ``RoundedRows`` in place of its input where kernels run."""
    return bool(getattr(module, "takes_rounded_rows", False))


def fits(values: Tensor) -> bool:
    """Whether torch's FP8 product takes a weight [N, K] of these sizes."""
    return all(size % STEP == 0 for size in values.shape)


def quantize(weight: Tensor) -> Fp8Rows:
    """A matrix [N, K] as FP8 rows; a row of zeros has scale 1."""
    limit = torch.finfo(FP8).max
    values = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    # Part by part: all of a head in float32 would take twice the memory of its bfloat16 weight.
    for part, out, scale in zip(
        weight.split(4096), values.split(4096), scales.split(4096), strict=True
    ):
        largest = part.abs().amax(dim=1).float()
        scale.copy_(torch.where(largest > 0, largest / limit, 1.0))
        out.copy_((part.float() / scale[:, None]).clamp(-limit, limit).to(FP8))
    return Fp8Rows(values, scales)


def product_naive(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T`` [T, N] in plain torch, summed in float32 and rounded to ``dtype``."""
    sums = F.linear(x.values.float(), weight.values.float())
    return (sums * x.scales[:, None] * weight.scales).to(dtype)
