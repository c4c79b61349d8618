"""Torch in place of the int8 kernels of SGLang's quantised linears, which a CPU here lacks."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.int8 import rounded


def product(
    rows: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    weight_scales: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """Rows [T, in] times a weight [in, out], both int8, with their scales."""
    out = (rows.float() * row_scales) @ (weight.float() * weight_scales.T)
    return (out if bias is None else out + bias).to(out_dtype)


def turn_on() -> None:
    """For SGLang's W8A8 linears in this process."""
    from sglang.srt.layers.quantization import w8a8_int8

    config = w8a8_int8.W8A8Int8Config
    config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32])
    w8a8_int8._is_cpu = False  # It would pack the weights for AMX.
    w8a8_int8.per_token_quant_int8 = rounded
    w8a8_int8.int8_scaled_mm = product
