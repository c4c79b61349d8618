"""Quantised checkpoints made from plain ones, number by number, with what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_plugin.checkpoints.stored_weights import fp8_rows, stored_weights
from dflash_plugin.checkpoints.tensors import checkpoint_names
from dflash_plugin.drafter.fp8_linear import Fp8Linear, Fp8QKV
from dflash_plugin.drafter.layers import TorchQKV
from dflash_plugin.drafter.model import Drafter

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = torch.float8_e4m3fn


class Quantised(NamedTuple):
    """A quantised matrix.

    Attributes:
        parts: tensors by the last parts of their names.
        value: what they stand for, float32.
        step: the largest distance from the matrix that rounding may cause, broadcasts to it.
    """

    parts: dict[str, Tensor]
    value: Tensor
    step: Tensor


def fp8(weight: Tensor, rows: int, columns: int, name: str = "weight_scale") -> Quantised:
    """FP8 with one scale for each block of rows and columns; a block may be cut at the edges."""
    value, step = torch.empty_like(weight), torch.empty_like(weight)
    whole = torch.empty(weight.shape, dtype=E4M3)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale = scales[i, j] = weight[place].abs().max().clamp(min=1e-6) / 448
            rounded = whole[place] = (weight[place] / scale).to(E4M3)
            value[place] = rounded.float() * scale
            step[place] = scale * (rounded.float().abs() / 16 + 2**-9)
    return Quantised({"weight": whole, name: scales}, value, step)


def fp8_tensor(weight: Tensor) -> Quantised:
    """FP8 with one scale, which has no dimension."""
    made = fp8(weight, *weight.shape)
    return made._replace(
        parts={**made.parts, "weight_scale": made.parts["weight_scale"].flatten()[0]}
    )


def fp8_channels(weight: Tensor) -> Quantised:
    """FP8 with one scale a row."""
    return fp8(weight, 1, weight.shape[1])


def fp8_blocks(weight: Tensor) -> Quantised:
    """FP8 with one scale for 16 x 32 numbers, as DeepSeek's checkpoints name it."""
    return fp8(weight, 16, 32, "weight_scale_inv")


def integers(
    weight: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Quantised]:
    """Codes int64 [rows, columns], scales and zero points [rows, groups], and their meaning."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // group, group)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale = grouped.abs().amax(-1).clamp(min=1e-6) / high
        zero = torch.zeros_like(scale)
    else:
        least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (most - least).clamp(min=1e-6) / (high - low)
        zero = (low - least / scale).round().clamp(low, high)
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(low, high)
    value = ((codes - zero[..., None]) * scale[..., None]).view(rows, columns)
    step = scale.repeat_interleave(group, dim=1)
    return codes.view(rows, columns).long(), scale, zero.long(), Quantised({}, value, step)


def int8(weight: Tensor, symmetric: bool = True) -> Quantised:
    """int8 with one scale a row, and a zero point."""
    codes, scale, zero, made = integers(weight, 8, weight.shape[1], symmetric)
    parts = {"weight": codes.to(torch.int8), "weight_scale": scale}
    if not symmetric:
        parts["weight_zero_point"] = zero.to(torch.int8)
    return made._replace(parts=parts)


def packed(weight: Tensor, bits: int, group: int, symmetric: bool = True) -> Quantised:
    """Integers packed into int32, with one scale a group, and zero points packed along rows."""
    codes, scale, zero, made = integers(weight, bits, group, symmetric)
    parts = {
        "weight_packed": int32_of(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = int32_of(zero.T, bits).T.contiguous()
    return made._replace(parts=parts)


def int32_of(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of each row, packed from the lowest bits up."""
    packed = []
    for row in codes.tolist():
        for start in range(0, len(row), 32 // bits):
            word = 0
            for place, code in enumerate(row[start : start + 32 // bits]):
                word += (code + 2 ** (bits - 1)) << (bits * place)
            packed.append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(packed, dtype=torch.int32).view(len(codes), -1)


def nvfp4(weight: Tensor, modelopt: bool = False) -> Quantised:
    """FP4 in groups of 16 with an FP8 scale each; the scale of all is a factor or a divisor."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // 16, 16)
    whole = weight.abs().max() / (6 * 448)
    if not modelopt:
        # Stored the other way round, and so read from what is stored.
        divisor = 1 / whole
    scale = (grouped.abs().amax(-1) / 6 / whole).to(E4M3)
    by_group = scale.float() * whole if modelopt else scale.float() / divisor
    scaled = grouped / by_group.clamp(min=1e-9)[..., None]
    codes = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    value = (FP4[codes] * scaled.sign()) * by_group[..., None]
    nibbles = (codes + 8 * (scaled < 0)).view(rows, columns // 2, 2)
    both = (nibbles[..., 0] + 16 * nibbles[..., 1]).to(torch.uint8)
    # Half the gap between 4 and 6, and what the scale's own rounding cuts off.
    step = (by_group * 1.5).repeat_interleave(16, dim=1)
    parts = {"weight_scale": scale}
    if modelopt:
        parts |= {"weight": both, "weight_scale_2": whole}
    else:
        parts |= {"weight_packed": both, "weight_global_scale": divisor.view(1)}
    return Quantised(parts, value.view(rows, columns), step)


COMPRESSED = {"quant_method": "compressed-tensors"}


def groups(kind: str, bits: int, **weights: Any) -> dict[str, Any]:
    """``config_groups`` of a compressed-tensors checkpoint."""
    said = {"type": kind, "num_bits": bits, "symmetric": True, **weights}
    return {"group_0": {"targets": ["Linear"], "weights": said}}


class Layout(NamedTuple):
    """How a checkpoint is quantised.

    Attributes:
        quantise: a matrix.
        config: quantization_config.
        named: what the reader says of it.
    """

    quantise: Callable[[Tensor], Quantised]
    config: dict[str, Any] | None
    named: str


TOKEN = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
W8A8 = Layout(
    int8,
    {
        **COMPRESSED,
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                **groups("int", 8, strategy="channel")["group_0"],
                "input_activations": TOKEN,
            }
        },
    },
    "compressed-tensors int8",
)
"""int8 for int8 activations, with all that a published config.json says."""

LAYOUTS: dict[str, Layout] = {
    "FP8 by tensor": Layout(
        fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}, "fp8"
    ),
    "FP8 by channel": Layout(
        fp8_channels,
        {**COMPRESSED, "format": "float-quantized", "config_groups": groups("float", 8)},
        "compressed-tensors FP8",
    ),
    "FP8 by block": Layout(
        fp8_blocks, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}, "fp8"
    ),
    "int8": Layout(
        int8,
        {**COMPRESSED, "format": "int-quantized", "config_groups": groups("int", 8)},
        "compressed-tensors int8",
    ),
    "int8 with zero points": Layout(
        lambda weight: int8(weight, symmetric=False),
        {**COMPRESSED, "config_groups": groups("int", 8, symmetric=False)},
        "compressed-tensors int8",
    ),
    "W4A16": Layout(
        lambda weight: packed(weight, 4, 16),
        {
            **COMPRESSED,
            "format": "pack-quantized",
            "config_groups": groups("int", 4, group_size=16),
        },
        "compressed-tensors W4A16",
    ),
    "W4A16 with zero points": Layout(
        lambda weight: packed(weight, 4, 16, symmetric=False),
        {**COMPRESSED, "config_groups": groups("int", 4, group_size=16, symmetric=False)},
        "compressed-tensors W4A16",
    ),
    "W8A16": Layout(
        lambda weight: packed(weight, 8, weight.shape[1]), None, "compressed-tensors W8A16"
    ),
    "NVFP4": Layout(
        nvfp4,
        {**COMPRESSED, "format": "nvfp4-pack-quantized", "config_groups": groups("float", 4)},
        "compressed-tensors NVFP4",
    ),
    "ModelOpt FP8": Layout(
        fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt FP8"
    ),
    "ModelOpt NVFP4": Layout(
        lambda weight: nvfp4(weight, modelopt=True),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "modelopt NVFP4",
    ),
}


def is_linear(name: str) -> bool:
    """Whether a canonical tensor is what quantisers quantise."""
    return name.endswith("_proj.weight") or name == "fc.weight"


def quantise(plain: Path, output: Path, layout: Layout) -> Path:
    """Write a plain checkpoint quantised, and make the plain one what it stands for.

    Args:
        plain: a checkpoint in z-lab's dialect; its linears become the dequantised ones.
        output: the directory of the quantised one.
        layout: how its linears are quantised.
    """
    whole, stored = load_file(plain / "model.safetensors"), {}
    for name, tensor in list(whole.items()):
        if not is_linear(name):
            stored[name] = tensor
            continue
        made = layout.quantise(tensor)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": value.contiguous() for part, value in made.parts.items()}
        whole[name] = made.value
    save_file(whole, plain / "model.safetensors", metadata={"format": "pt"})
    output.mkdir(parents=True, exist_ok=True)
    save_file(stored, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    if layout.config is not None:
        config["quantization_config"] = layout.config
    (output / "config.json").write_text(json.dumps(config))
    return output


def keep_fp8_rows(drafter: Drafter, directory: Path) -> Drafter:
    """Let the core multiply the FP8 rows that a checkpoint stores, as engines do.

    Args:
        drafter: has the dequantised weights.
        directory: of the quantised checkpoint.
    """
    rows = fp8_rows(stored_weights(directory))
    for own, names in checkpoint_names(drafter).items():
        if not all(name in rows for name in names):
            continue
        module, _, child = own.removesuffix(".weight").rpartition(".")
        parent = drafter.get_submodule(module)
        linear = cast(Any, getattr(parent, child))
        made = Fp8QKV(linear) if isinstance(linear, TorchQKV) else Fp8Linear(linear)
        made.values = torch.cat([rows[name].values for name in names])
        made.scales = torch.cat([rows[name].scales for name in names])
        setattr(parent, child, made)
    return drafter
