"""FP8 rows: the types that kernels and linears exchange, and their rounding in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
# The library's product takes multiples of this.
STEP = 16


class Fp8Rows(NamedTuple):
    """Quantized rows.

    Attributes:
        values: float8_e4m3fn [N, K].
        scales: float32 [N], what the rows of ``values`` are multiplied by.
    """

    values: Tensor
    scales: Tensor

    def rows(self, start: int) -> Fp8Rows:
        """The rows from ``start`` on."""
        return Fp8Rows(self.values[start:], self.scales[start:])


class RoundedRows(NamedTuple):
    """FP8 rows that stand for a linear's input.

    Attributes:
        values: float8_e4m3fn [T, K].
        scales: float32 [T].
        dtype: of what was rounded, and of the product.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def round_rows(x: Tensor) -> RoundedRows:
    """Rows x [T, K] rounded, in plain torch."""
    return RoundedRows(*quantize(x), x.dtype)


def takes_rounded(module: nn.Module) -> bool:
    """Whether a linear takes ``RoundedRows`` in place of its input, on a GPU."""
    return bool(getattr(module, "takes_rounded_rows", False))


def fits(values: Tensor) -> bool:
    """Whether a GPU multiplies by an FP8 weight [N, K] of such sizes."""
    return all(size % STEP == 0 for size in values.shape)


def quantize(weight: Tensor) -> Fp8Rows:
    """FP8 rows of a matrix [N, K], each scaled so that its largest value is FP8's largest."""
    limit = torch.finfo(FP8).max
    values = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    # By parts: a head in float32 would be twice its own size again.
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
