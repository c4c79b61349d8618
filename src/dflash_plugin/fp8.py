"""FP8 weights for a drafter, made at load from the checkpoint's own.

At few requests a draft pass waits for its weights, so half the bytes is nearly half the time.
Drafts only propose: what rounding changes costs acceptance and never correctness.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin import kernels
from dflash_plugin.drafter import Drafter, TorchQKV
from dflash_plugin.errors import DFlashError

FP8 = torch.float8_e4m3fn


class Fp8Weight(NamedTuple):
    """Quantised rows.

    Attributes:
        values: float8_e4m3fn [N, K].
        scales: float32 [N], what the rows of ``values`` are multiplied by.
    """

    values: Tensor
    scales: Tensor

    def rows(self, start: int) -> Fp8Weight:
        """The rows from ``start`` on."""
        return Fp8Weight(self.values[start:], self.scales[start:])


def quantise(weight: Tensor) -> Fp8Weight:
    """FP8 rows of a weight [N, K], each scaled so that its largest value is FP8's largest."""
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
    return Fp8Weight(values, scales)


def require_fp8(device: torch.device) -> None:
    """Check that kernels of a device read FP8.

    Raises:
        DFlashError: it is an older GPU.
    """
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise DFlashError(
            f"FP8 draft weights need a GPU of compute capability 8.9 or more, and "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: leave draft_weights at "
            "'checkpoint'"
        )


def linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ (values * scales).T + bias``, summed in float32 and rounded once to x's dtype.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: of N rows.
        bias: [N], or None.
    """
    if kernels.available(x.device):
        out: Tensor = _fused(x, weight.values, weight.scales, bias)
        return out
    return linear_naive(x, weight, bias)


def linear_naive(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """``linear`` in plain torch, which makes the whole weight again at each call."""
    whole = weight.values.float() * weight.scales[:, None]
    return F.linear(x.float(), whole, None if bias is None else bias.float()).to(x.dtype)


# An operator, so that an engine that compiles the drafter sees one call whatever the rows are.
@torch.library.custom_op("dflash_plugin::fp8_linear", mutates_args=())
def _fused(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    from dflash_plugin.kernels.fp8_linear import fp8_linear

    return fp8_linear(x, Fp8Weight(values, scales), bias)


@_fused.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


class Fp8Linear(nn.Module):
    """A linear with an FP8 copy of another's weight."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        quantised = quantise(source.weight.detach())
        self.register_buffer("values", quantised.values)
        self.register_buffer("scales", quantised.scales)
        bias = None if source.bias is None else source.bias.detach()
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Fp8Weight:
        """Its rows."""
        return Fp8Weight(cast(Tensor, self.values), cast(Tensor, self.scales))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return linear(x, self.weight, cast("Tensor | None", self.bias))


class Fp8QKV(Fp8Linear):
    """``QKVLinear`` with an FP8 weight."""

    def __init__(self, source: TorchQKV) -> None:
        super().__init__(source)
        self.query_width = source.query_width

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys and values alone."""
        bias = cast("Tensor | None", self.bias)
        rest = None if bias is None else bias[self.query_width :]
        return linear(x, self.weight.rows(self.query_width), rest)


def quantise_drafter(drafter: Drafter) -> None:
    """Give every linear of a drafter on torch's modules an FP8 weight, its head included.

    A head that it borrows is copied; the target keeps its own. Such a drafter cannot be trained or
    saved.

    Args:
        drafter: bound to its target.

    Raises:
        DFlashError: its GPU has no FP8.
    """
    require_fp8(drafter.norm.weight.device)
    head = drafter.head()
    if drafter.own_head is None and isinstance(head, nn.Linear):
        drafter.replace_borrowed_head(Fp8Linear(head))
    for parent in list(drafter.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TorchQKV):
                setattr(parent, name, Fp8QKV(child))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, Fp8Linear(child))
