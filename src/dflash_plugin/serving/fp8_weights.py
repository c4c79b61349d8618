"""FP8 weights for a drafter on an engine's layers: the option ``draft_weights``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.drafter.fp8_linear import KEPT, linear, require_fp8
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.fp8_rows import Fp8Rows, RoundedRows, fits, quantize
from dflash_plugin.serving.layers import QKVShard


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


def is_rounded(module: nn.Module) -> bool:
    """Whether this module has rounded a layer's weight."""
    return isinstance(getattr(module, "quant_method", None), Fp8Method)


def plain_values(module: Any) -> Tensor:
    """A linear's weight [out, in], in float32 where it is rounded."""
    if not is_rounded(module):
        weight: Tensor = module.weight
        return weight
    rows = rows_of(module)
    return rows.values.float() * rows.scales[:, None]


@contextmanager
def plain_weight(module: Any) -> Iterator[nn.Parameter]:
    """A rounded weight as the plain one that its engine's loader fills, float32 [out, in].

    When the block ends it is rounded again, in place.

    Args:
        module: its weight is rounded.
    """
    (parameter,) = module.unrounded
    kept, parameter.data = parameter.data, plain_values(module)
    try:
        yield parameter
        round_into(module, parameter.data)
    finally:
        parameter.data = kept


@torch.no_grad()
def round_into(module: Any, weight: Tensor) -> None:
    """Round a weight [out, in] into the storage of a module whose weight is rounded."""
    rounded = quantize(weight)
    module.weight.copy_(rounded.values)
    module.fp8_scales.copy_(rounded.scales)


def fp8_obstacle(drafter: Drafter, plain: type, device: torch.device) -> str | None:
    """Why ``draft_weights: auto`` keeps the checkpoint's weights; None where it rounds them.

    Args:
        drafter: its weights are loaded.
        plain: the engine's method of linears that are not quantized.
        device: where it runs.
    """
    if device.type != "cuda":
        return "the drafter does not run on a GPU"
    try:
        require_fp8(device)
    except DFlashError as error:
        return str(error).partition(":")[0]
    for name, module in rounded_linears(drafter):
        if not isinstance(module.quant_method, plain):
            return f"the checkpoint quantizes {name}"
        if module.weight.dtype not in (torch.bfloat16, torch.float16):
            return f"{name} is {module.weight.dtype}"
        if not fits(module.weight):
            return f"the sides of {name}, {tuple(module.weight.shape)}, are no multiples of 16"
    return None


def stored_context_rows(linears: Sequence[QKVShard]) -> Fp8Rows | None:
    """The rows that make keys and values of all layers; None where one stores no FP8 rows.

    Args:
        linears: of all layers.
    """
    kept = []
    for one in linears:
        rows = _stored_rows(one)
        if rows is None:
            return None
        kept.append(rows.rows(one.query_width))
    values, scales = zip(*kept, strict=True)
    return Fp8Rows(torch.cat(values), torch.cat(scales))


def keep_stored_rows(drafter: Drafter) -> int:
    """Give linears the FP8 rows that the checkpoint stores of them, and leave the others alone.

    Args:
        drafter: its weights are loaded.

    Returns:
        How many linears have such rows.
    """
    kept = [module for _, module in rounded_linears(drafter) if _stored_rows(module) is not None]
    for module in kept:
        _quantize(module)
    return len(kept)


def drop_stored_rows(drafter: Drafter) -> None:
    """Forget the rows that loading left beside plain weights."""
    for module in drafter.modules():
        vars(module).pop("stored_rows", None)


def _stored_rows(linear: Any) -> Fp8Rows | None:
    return cast("Fp8Rows | None", getattr(linear, "stored_rows", None))


def rounded_linears(drafter: Drafter) -> Iterator[tuple[str, Any]]:
    """The linears that FP8 rounds, by name: all but the head and the small ones of other parts.

    Args:
        drafter: on an engine's layers.
    """
    kept = {id(m) for part in drafter.modules() if isinstance(part, KEPT) for m in part.modules()}
    for name, module in drafter.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and module is not drafter.own_head and id(module) not in kept:
            yield name, module


def quantize_engine_drafter(drafter: Drafter, plain: type) -> None:
    """Round the weights of the drafter's linears to FP8; each rank rounds its own shard.

    Weights that the checkpoint stores in FP8 rows become those rows. The small projections of
    convolutions, gates and selector keep their weights.

    Args:
        drafter: its weights are loaded.
        plain: the engine's method of linears that are not quantized.

    Raises:
        DFlashError: the checkpoint quantizes a linear, or the GPU has no FP8.
    """
    require_fp8(next(drafter.parameters()).device)
    for name, module in rounded_linears(drafter):
        if not isinstance(module.quant_method, plain):
            raise DFlashError(
                f"draft_weights is 'fp8', but the checkpoint quantizes {name} with "
                f"{type(module.quant_method).__name__}: leave draft_weights at 'checkpoint'"
            )
        _quantize(module)


def quantized_head(head: nn.Module, plain: type, own: bool) -> nn.Module:
    """A copy of an engine's head with an FP8 weight; the head itself where it is quantized already.

    Args:
        head: the target's or the drafter's own.
        plain: the engine's method of heads that are not quantized.
        own: it is the drafter's, and nothing else uses it.
    """
    if not isinstance(getattr(head, "quant_method", None), plain):
        return head
    copied = copy.copy(head)
    # copy.copy shares the tables of parameters and buffers between both modules.
    copied._parameters, copied._buffers = dict(head._parameters), dict(head._buffers)
    _quantize(copied, frees=own)
    return copied


def _quantize(module: nn.Module, *, frees: bool = True) -> None:
    plain = cast(nn.Parameter, module.weight)
    weight = _stored_rows(module) or quantize(plain.detach())
    # It stays for the loader that new weights go through; in a tuple, so that it is no parameter of
    # the module.
    cast(Any, module).unrounded = (plain,)
    if frees:
        plain.data = plain.data.new_empty(0)
    module.weight = nn.Parameter(weight.values, requires_grad=False)
    module.register_buffer("fp8_scales", weight.scales, persistent=False)
    cast(Any, module).quant_method = Fp8Method()
    cast(Any, module).takes_rounded_rows = fits(weight.values)
