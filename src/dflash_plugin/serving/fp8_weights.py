"""FP8 weights for a drafter on an engine's layers: the option ``draft_weights: fp8``."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.drafter.convolution import DynamicConvolution
from dflash_plugin.drafter.fp8_linear import linear, require_fp8
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.selector import CandidateSelector
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.fp8_rows import Fp8Rows, RoundedRows, fits, quantize


def product(x: Tensor | RoundedRows, weight: Tensor | Fp8Rows, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``; a plain weight needs plain rows.

    Args:
        x: [T, in], or rows rounded to FP8.
        weight: [out, in], plain or FP8.
        bias: [out], or None.
    """
    if isinstance(weight, Fp8Rows):
        return linear(x, weight, bias)
    assert isinstance(x, Tensor)
    return F.linear(x, weight, bias)


class Fp8Method:
    """Replaces an engine's ``quant_method``, which multiplies by a layer's weight.

    The scales are a buffer of the layer, because a compiled model reads buffers and would keep any
    other tensor as a constant.
    """

    def apply(self, layer: Any, x: Tensor | RoundedRows, bias: Tensor | None = None) -> Tensor:
        """Rows [..., in] times this shard's weight [out, in], as [..., out]."""
        return linear(x, rows_of(layer), bias)


def rows_of(layer: Any) -> Fp8Rows:
    """The FP8 weight of a layer whose method is an ``Fp8Method``."""
    return Fp8Rows(layer.weight, layer.fp8_scales)


def quantize_engine_drafter(drafter: Drafter, plain: type) -> None:
    """Round the weights of the drafter's linears to FP8; each rank rounds its own shard.

    The small projections of convolutions and selector keep their weights.

    Args:
        drafter: its weights are loaded.
        plain: the engine's method of linears that are not quantized.

    Raises:
        DFlashError: the checkpoint quantizes a linear, or the GPU has no FP8.
    """
    require_fp8(next(drafter.parameters()).device)
    parts = (DynamicConvolution, CandidateSelector)
    kept = {id(m) for part in drafter.modules() if isinstance(part, parts) for m in part.modules()}
    for name, module in drafter.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or module is drafter.own_head or id(module) in kept:
            continue
        if not isinstance(method, plain):
            raise DFlashError(
                f"draft_weights is 'fp8', but the checkpoint quantizes {name} with "
                f"{type(method).__name__}: leave draft_weights at 'checkpoint'"
            )
        _quantize(module)


def quantized_head(head: nn.Module, plain: type) -> nn.Module:
    """A copy of an engine's head with an FP8 weight; the head itself where it is quantized already.

    Args:
        head: the target's or the drafter's own.
        plain: the engine's method of heads that are not quantized.
    """
    if not isinstance(getattr(head, "quant_method", None), plain):
        return head
    copied = copy.copy(head)
    # copy.copy shares the tables of parameters and buffers between both modules.
    copied._parameters, copied._buffers = dict(head._parameters), dict(head._buffers)
    _quantize(copied)
    return copied


def _quantize(module: nn.Module) -> None:
    weight = quantize(cast(Tensor, module.weight).detach())
    module.weight = nn.Parameter(weight.values, requires_grad=False)
    module.register_buffer("fp8_scales", weight.scales, persistent=False)
    cast(Any, module).quant_method = Fp8Method()
    cast(Any, module).takes_rounded_rows = fits(weight.values)
