"""FP8 weights for a drafter, made at load from the checkpoint's own.

Weights are rounded once, and a product's inputs at every product, both by rows, so that a GPU
multiplies FP8. A product of few rows then reads half the bytes; a product of many rows uses
multipliers that are twice as fast. Rounding can lower acceptance but never changes the output text,
as the target verifies every draft.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dflash_plugin import kernels
from dflash_plugin.drafter.convolution import DynamicConvolution
from dflash_plugin.drafter.gate import AttentionGate
from dflash_plugin.drafter.layers import TorchQKV
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.selector import CandidateSelector
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.fp8_product import best_tile, fp8_product
from dflash_plugin.kernels.fp8_rows import Fp8Rows, RoundedRows, fits, product_naive, quantize
from dflash_plugin.kernels.quantize_rows import quantize_rows

# Their small projections keep their weights.
KEPT = (DynamicConvolution, CandidateSelector, AttentionGate)


def require_fp8(device: torch.device) -> None:
    """Check that a device multiplies FP8.

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


def linear(x: Tensor | RoundedRows, weight: Fp8Rows, bias: Tensor | None = None) -> Tensor:
    """``x @ (values * scales).T + bias`` with x's rows rounded like the weight's.

    Args:
        x: float32, bfloat16 or float16 [..., K], or [T, K] already rounded, on a GPU.
        weight: of N rows.
        bias: [N], or None.

    Returns:
        [..., N] in x's dtype, which a GPU's product of many rows reaches through bfloat16.
    """
    if isinstance(x, RoundedRows):
        out = _product(Fp8Rows(x.values, x.scales), weight, x.dtype)
        return out if bias is None else out + bias
    flat = x.reshape(-1, x.shape[-1])
    product = _multiply if kernels.available(x.device) and fits(weight.values) else linear_naive
    out = cast(Tensor, product(flat, weight.values, weight.scales))
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], weight.values.shape[0])


def linear_naive(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """The product of rows x [T, K] in plain torch, summed in float32."""
    return product_naive(quantize(x), Fp8Rows(values, scales), x.dtype)


def library_product(x: Fp8Rows, weight: Fp8Rows) -> Tensor:
    """``x @ weight.T``, bfloat16 [T, N], by the library; sides are multiples of ``STEP``."""
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales[:, None],
        scale_b=weight.scales[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _product(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T`` [T, N] on a GPU."""
    count, columns = x.values.shape[0], weight.values.shape[0]
    if count == 0:
        return x.scales.new_empty(0, columns, dtype=dtype)
    tile = best_tile(count, columns, x.values.device)
    if tile is not None:
        return fp8_product(x, weight, dtype, tile=tile)
    return library_product(x, weight).to(dtype)


# An operator, so that an engine that compiles the drafter sees one call whatever the rows are.
@torch.library.custom_op("dflash_plugin::fp8_linear", mutates_args=())
def _multiply(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    return _product(quantize_rows(x), Fp8Rows(values, scales), x.dtype)


@_multiply.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


class Fp8Linear(nn.Module):
    """A linear with an FP8 copy of another's weight."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        quantized = quantize(source.weight.detach())
        self.takes_rounded_rows = fits(quantized.values)
        self.register_buffer("values", quantized.values)
        self.register_buffer("scales", quantized.scales)
        bias = None if source.bias is None else source.bias.detach()
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Fp8Rows:
        """Its rows."""
        return Fp8Rows(cast(Tensor, self.values), cast(Tensor, self.scales))

    def forward(self, x: Tensor | RoundedRows) -> Tensor:
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


def quantize_drafter(drafter: Drafter) -> None:
    """Give every linear of a drafter on torch's modules an FP8 weight, its head included.

    The small projections of convolutions, gates and selector stay as they are. A head that it
    borrows is copied; the target keeps its own. Such a drafter cannot be trained or saved.

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
        if isinstance(parent, KEPT):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, TorchQKV):
                setattr(parent, name, Fp8QKV(child))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, Fp8Linear(child))
