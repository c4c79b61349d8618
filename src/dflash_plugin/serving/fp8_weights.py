"""FP8 weights for a drafter on an engine's layers, as ``draft_weights: fp8`` asks for."""

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
    """``x @ weight.T + bias``, where rounded rows want a rounded weight."""
    if isinstance(weight, Fp8Rows):
        return linear(x, weight, bias)
    assert isinstance(x, Tensor)
    return F.linear(x, weight, bias)


class Fp8Method:
    """Takes the place of an engine's way to multiply by a layer's weight.

    The scales are a buffer of the layer: a compiled model reads it, and would keep anything else as
    it was.
    """

    def apply(self, layer: Any, x: Tensor | RoundedRows, bias: Tensor | None = None) -> Tensor:
        """[..., K] to [..., N], this shard's."""
        return linear(x, rows_of(layer), bias)


def rows_of(layer: Any) -> Fp8Rows:
    """The rounded weight of a layer that has an ``Fp8Method``."""
    return Fp8Rows(layer.weight, layer.fp8_scales)


def quantize_engine_drafter(drafter: Drafter, plain: type) -> None:
    """Round the weights of the drafter's linears to FP8, each rank its own shard's.

    The small projections of convolutions and selector stay as they are.

    Args:
        drafter: its weights are loaded.
        plain: the engine's method of linears that are not quantized.

    Raises:
        DFlashError: a linear is quantized already, or the GPU has no FP8.
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
    """A copy of an engine's head with an FP8 weight; the head itself where it is not plain.

    Args:
        head: the target's or the drafter's own.
        plain: the engine's method of heads that are not quantized.
    """
    if not isinstance(getattr(head, "quant_method", None), plain):
        return head
    copied = copy.copy(head)
    # A copied module shares its tables of tensors with the first.
    copied._parameters, copied._buffers = dict(head._parameters), dict(head._buffers)
    _quantize(copied)
    return copied


def _quantize(module: nn.Module) -> None:
    weight = quantize(cast(Tensor, module.weight).detach())
    module.weight = nn.Parameter(weight.values, requires_grad=False)
    module.register_buffer("fp8_scales", weight.scales, persistent=False)
    cast(Any, module).quant_method = Fp8Method()
    cast(Any, module).takes_rounded_rows = fits(weight.values)
