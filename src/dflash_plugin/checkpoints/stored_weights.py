"""The weights of a quantised checkpoint as they are stored, for engines that multiply them so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dflash_plugin.checkpoints.dequantize import spread
from dflash_plugin.checkpoints.files import read_json
from dflash_plugin.checkpoints.fused import part_rows, split_fused
from dflash_plugin.checkpoints.io import CONFIG, read_tensors
from dflash_plugin.checkpoints.quantization import PLAIN, quantised_modules
from dflash_plugin.checkpoints.quantization_config import COMPRESSED_TENSORS, sections
from dflash_plugin.kernels.fp8_rows import FP8, Fp8Rows

_SCALES = ("weight_scale", "weight_scale_inv")


class StoredWeights(NamedTuple):
    """What a checkpoint stores of its quantised weights.

    Attributes:
        modules: tensors by the last parts of their names, by modules under canonical names.
        section: what config.json or hf_quant_config.json says of them; {} where neither does.
        raw: config.json.
    """

    modules: dict[str, dict[str, Tensor]]
    section: dict[str, Any]
    raw: dict[str, Any]

    @property
    def method(self) -> str:
        """The quantisation method, as engines call it; "" where nothing is declared."""
        named = str(self.section.get("quant_method") or "").lower().replace("_", "-")
        return COMPRESSED_TENSORS if not named and "config_groups" in self.section else named

    @property
    def rounds_activations(self) -> bool:
        """Whether the weights are meant for activations that are rounded, too."""
        groups = self.section.get("config_groups")
        if self.method == COMPRESSED_TENSORS and isinstance(groups, dict):
            return any(group.get("input_activations") for group in groups.values())
        return bool(self.method)


def stored_weights(directory: Path, *, headers_only: bool = False) -> StoredWeights:
    """Read a checkpoint's quantised weights.

    Args:
        directory: of a checkpoint that ``load_checkpoint`` reads.
        headers_only: give tensors on the meta device, but for ``weight_shape``.

    Raises:
        DFlashError: a file is missing or broken, or a layout is not read.
    """
    raw = read_json(directory / CONFIG)
    tensors = read_tensors(directory, headers_only, pickles=False)
    said: dict[str, Any] = next((section for _, section in sections(raw, directory)), {})
    return StoredWeights(quantised_modules(tensors), {**said, **said.get("quantization", {})}, raw)


def elements(parts: Mapping[str, Tensor]) -> int:
    """Numbers that a quantised weight stands for."""
    shape = parts.get("weight_shape")
    if shape is not None:
        return int(shape.prod())
    weight = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    return weight.numel() * (2 if weight.dtype == torch.uint8 else 1)


def fp8_rows(stored: StoredWeights) -> dict[str, Fp8Rows]:
    """The FP8 weights with one scale for a weight, a row or a part, as rows; blocks are left out.

    Args:
        stored: of a checkpoint.

    Returns:
        By canonical names of weights, fused ones split into their parts.
    """
    split: dict[str, Tensor] = {}
    for module, parts in stored.modules.items():
        scale = next((parts[name] for name in _SCALES if name in parts), None)
        weight = parts.get("weight")
        if scale is None or scale.dtype not in PLAIN or "weight_zero_point" in parts:
            continue
        if weight is None or weight.dtype != FP8 or weight.dim() != 2:
            continue
        rows, columns = weight.shape
        sizes = part_rows(f"{module}.weight", rows, stored.raw) if scale.dim() == 1 else ()
        # No block is as large as this, so that scales of blocks do not fit.
        found = spread(scale, (rows, columns), (rows + 1, columns + 1), sizes)
        if found is not None and found.shape[1] == 1:
            split[f"{module}.weight"] = weight
            split[f"{module}.scale"] = found.expand(rows, 1)
    split = split_fused(split, stored.raw)
    return {
        name: Fp8Rows(values, split[f"{name.removesuffix('.weight')}.scale"][:, 0])
        for name, values in split.items()
        if name.endswith(".weight")
    }
