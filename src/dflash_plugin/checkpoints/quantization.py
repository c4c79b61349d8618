"""Quantised weights of a checkpoint: which layout they have, and the plain matrices in their place.

config.json names the method, the tensors decide the layout. What is not read is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.checkpoints.dequantize import FP4_GROUP, spread, unpack_fp4, unpack_int32
from dflash_plugin.checkpoints.quantization_config import Declared, refusal
from dflash_plugin.errors import DFlashError

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
# Last parts of the names of a weight's tensors.
PARTS = (
    "weight",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
)
# Scales of activations and of the KV cache: weights do not depend on them.
_IGNORED = re.compile(
    r"\.((input|output|activation)_(scale|scale_inv|zero_point|global_scale)"
    r"|([kvq]|kv|prob_output)_(scale|zero_point))$"
)
_FOREIGN = (
    (re.compile(r"\.(qweight|qzeros|g_idx|scales)$"), "GPTQ's or AWQ's layout"),
    (
        re.compile(r"\.(absmax|quant_map|SCB|weight_format)$|\.nested_|\.quant_state\."),
        "bitsandbytes' layout",
    ),
    (re.compile(r"_(blocks|scales)$"), "the MXFP4 layout"),
    (re.compile(r"\.pre_quant_scale$"), "ModelOpt's AWQ layout"),
    (re.compile(r"\.weight_g_idx$"), "columns that are out of order"),
)
# Rows of the parts of a fused weight, given its name and all its rows; [] where it is not fused.
PartRows = Callable[[str, int], Sequence[int]]


class Dequantised(NamedTuple):
    """What is left of a checkpoint's quantisation.

    Attributes:
        tensors: plain tensors alone.
        quantization: the method and its layouts, such as "compressed-tensors W4A16"; None where
            every weight was plain.
        ignored: names of scales of activations and of the KV cache.
    """

    tensors: dict[str, Tensor]
    quantization: str | None
    ignored: list[str]


def dequantise(
    tensors: Mapping[str, Tensor], declared: Declared, part_rows: PartRows
) -> Dequantised:
    """Put a plain weight in the place of each quantised one.

    Args:
        tensors: canonical names; on the meta device if only shapes are wanted, but for
            ``weight_shape``.
        declared: what config.json says.
        part_rows: sizes of the parts of fused weights.

    Returns:
        The weights in the dtype of the checkpoint's plain tensors.

    Raises:
        DFlashError: a layout is not read, or a tensor of it is missing or has another shape.
    """
    kept, modules, ignored = _by_module(tensors)
    dtype = _plain_dtype(modules)
    layouts: dict[str, str] = {}
    for module, parts in modules.items():
        if _is_plain(parts):
            kept[f"{module}.weight"] = parts["weight"]
            continue
        reader = _Weight(module, parts, declared, part_rows)
        value, layout, method = reader.read()
        kept[f"{module}.weight"] = value.to(dtype)
        layouts[layout] = method
    return Dequantised(kept, _described(layouts, declared.method), ignored)


def quantised_modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What is stored of each quantised weight, its activations' scales included.

    Args:
        tensors: canonical names.

    Returns:
        Tensors by the last parts of their names, by modules.

    Raises:
        DFlashError: a layout is not read.
    """
    _, modules, ignored = _by_module(tensors)
    found = {module: parts for module, parts in modules.items() if not _is_plain(parts)}
    for name in ignored:
        module, _, part = name.rpartition(".")
        if module in found:
            found[module][part] = tensors[name]
    return found


def _by_module(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], list[str]]:
    """Tensors that are no weights, the parts of each weight, and names of scales beside them."""
    others: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    ignored: list[str] = []
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        for pattern, layout in _FOREIGN:
            if pattern.search(name):
                raise refusal(f"tensor {name!r} belongs to {layout}, which is not read")
        if _IGNORED.search(name):
            ignored.append(name)
        elif part in PARTS:
            modules.setdefault(module, {})[part] = tensor
        else:
            others[name] = tensor
    return others, modules, ignored


def _is_plain(parts: Mapping[str, Tensor]) -> bool:
    return parts.keys() == {"weight"} and parts["weight"].dtype.itemsize > 1


def _plain_dtype(modules: Mapping[str, Mapping[str, Tensor]]) -> torch.dtype:
    for module in ("fc", "hidden_norm", "norm"):
        weight = modules.get(module, {}).get("weight")
        if weight is not None and weight.dtype in PLAIN:
            return weight.dtype
    return torch.bfloat16


def _described(layouts: Mapping[str, str], declared: str | None) -> str | None:
    """The method, then its layouts; the method "fp8" has one alone."""
    if not layouts:
        return None
    method = declared or min(layouts.values())
    return method if method == "fp8" else f"{method} {', '.join(sorted(layouts))}"


class _Weight:
    """One quantised weight and what belongs to it.

    Args:
        module: its name without the last part.
        parts: tensors by the last parts of their names.
        declared: what config.json says.
        part_rows: sizes of the parts of fused weights.
    """

    def __init__(
        self, module: str, parts: dict[str, Tensor], declared: Declared, part_rows: PartRows
    ) -> None:
        self.module, self.parts, self.declared = module, dict(parts), declared
        self.part_rows = part_rows
        # What a missing tensor belongs to, for the message.
        self.found = f"there is a tensor {self.name(next(iter(parts)))!r}"

    def read(self) -> tuple[Tensor, str, str]:
        """The weight float32 [rows, columns], its layout, and the method that writes such tensors.

        Raises:
            DFlashError: the layout is not read, or something of it does not fit.
        """
        if "weight_packed" in self.parts:
            packed = self.take("weight_packed", torch.int32, torch.uint8)
            if packed.dtype == torch.int32:
                value, layout = self.packed_integers(packed)
            else:
                value, layout = self.fp4(packed, "weight_global_scale", divides=True), "NVFP4"
            method = "compressed-tensors"
        else:
            weight = self.take("weight", torch.uint8, torch.int8, torch.float8_e4m3fn)
            if weight.dtype == torch.uint8:
                value = self.fp4(weight, "weight_scale_2", divides=False)
                layout, method = "NVFP4", "modelopt"
            elif weight.dtype == torch.int8:
                value, layout, method = self.scaled(weight.float()), "int8", "compressed-tensors"
            else:
                value, layout, method = self.scaled(weight.float()), "FP8", "fp8"
        for part in self.parts:
            raise refusal(f"tensor {self.name(part)!r} does not belong to its layout ({layout})")
        return value, layout, method

    def name(self, part: str) -> str:
        """A tensor's whole name."""
        return f"{self.module}.{part}"

    def take(self, part: str, *dtypes: torch.dtype) -> Tensor:
        """One of the tensors, which then is done with."""
        if part not in self.parts:
            raise refusal(f"{self.found}, and {self.name(part)!r}, which belongs to it, is missing")
        tensor = self.parts.pop(part)
        if tensor.dtype not in dtypes:
            beside = f" beside {self.name(next(iter(self.parts)))!r}" if self.parts else ""
            raise refusal(
                f"tensor {self.name(part)!r}{beside} is {_named(tensor.dtype)}, not "
                f"{' or '.join(map(_named, dtypes))}"
            )
        if part in ("weight", "weight_packed"):
            self.found = f"tensor {self.name(part)!r} is {_named(tensor.dtype)}"
        return tensor

    def matrix(self, tensor: Tensor, part: str) -> tuple[int, int]:
        """The shape of a tensor that has rows and columns."""
        if tensor.dim() != 2 or not tensor.numel():
            raise self.misfit(part, tensor, "rows and columns")
        return tensor.shape[0], tensor.shape[1]

    def misfit(self, part: str, tensor: Tensor, needed: str) -> DFlashError:
        """The error for a tensor of a wrong shape."""
        return refusal(
            f"tensor {self.name(part)!r} has shape {list(tensor.shape)}, which does not fit "
            f"{needed}"
        )

    def spread(self, part: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        """A scale or zero point that broadcasts to the weight."""
        parts = self.part_rows(self.name("weight"), shape[0]) if tensor.dim() == 1 else ()
        found = spread(tensor, shape, self.declared.block, parts)
        if found is None:
            raise self.misfit(part, tensor, f"a weight of {list(shape)}")
        return found

    def scaled(self, values: Tensor) -> Tensor:
        """Values times ``weight_scale``, or ``weight_scale_inv``, which multiplies, too."""
        shape = self.matrix(values, "weight")
        part = "weight_scale_inv" if "weight_scale_inv" in self.parts else "weight_scale"
        scale = self.take(part, *PLAIN, torch.float8_e8m0fnu)
        if "weight_zero_point" in self.parts or self.declared.asymmetric:
            dtypes = torch.int8, torch.int32, torch.float8_e4m3fn, *PLAIN
            zero = self.take("weight_zero_point", *dtypes)
            if zero.shape != scale.shape:
                raise self.misfit("weight_zero_point", zero, f"{part} of {list(scale.shape)}")
            values = values - self.spread("weight_zero_point", zero, shape)
        return values * self.spread(part, scale, shape)

    def packed_integers(self, packed: Tensor) -> tuple[Tensor, str]:
        """Integers of four or eight bits, packed along the columns; zero points along the rows."""
        stated = self.take("weight_shape", torch.int64, torch.int32)
        shape = tuple(stated.flatten().tolist())
        if len(shape) != 2 or min(shape) < 1:
            raise refusal(f"tensor {self.name('weight_shape')!r} holds {list(shape)}, not a shape")
        rows, columns = shape
        fitting = [
            bits
            for bits in self.declared.packed_bits
            if packed.shape == (rows, -(-columns * bits // 32))
        ]
        if len(fitting) != 1:
            bits_said = " or ".join(map(str, self.declared.packed_bits))
            raise self.misfit(
                "weight_packed", packed, f"{rows} x {columns} numbers of {bits_said} bits"
            )
        (bits,) = fitting
        zero = self.parts.get("weight_zero_point")
        if zero is not None and zero.dtype == torch.int32:
            scale = self.parts.get("weight_scale")
            groups = scale.shape[-1] if scale is not None and scale.dim() == 2 else 0
            if zero.shape != (-(-rows * bits // 32), groups):
                raise self.misfit(
                    "weight_zero_point", zero, f"{rows} x {groups} numbers of {bits} bits"
                )
            self.parts["weight_zero_point"] = unpack_int32(zero.T, bits, rows).T
        return self.scaled(unpack_int32(packed, bits, columns)), f"W{bits}A16"

    def fp4(self, packed: Tensor, global_part: str, divides: bool) -> Tensor:
        """Two FP4 numbers a byte, an FP8 scale for each 16, and one scale for all of them."""
        part = "weight_packed" if divides else "weight"
        rows, half = self.matrix(packed, part)
        shape = rows, 2 * half
        scale = self.take("weight_scale", torch.float8_e4m3fn)
        if shape[1] % FP4_GROUP or scale.shape != (rows, shape[1] // FP4_GROUP):
            raise self.misfit("weight_scale", scale, f"groups of {FP4_GROUP} of {list(shape)}")
        whole = self.take(global_part, torch.float32)
        if whole.device.type != "meta":
            if not bool((torch.isfinite(whole) & (whole > 0)).all()):
                raise refusal(f"tensor {self.name(global_part)!r} holds {whole.tolist()}, no scale")
            whole = whole.to(packed.device)
        by_row = self.spread(global_part, whole, shape)
        if by_row.shape[1] != 1:
            raise self.misfit(global_part, whole, f"a weight of {list(shape)}")
        groups = scale.float() / by_row if divides else scale.float() * by_row
        return unpack_fp4(packed) * groups.repeat_interleave(FP4_GROUP, dim=1)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
