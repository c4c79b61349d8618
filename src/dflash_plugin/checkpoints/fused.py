"""Linears that some checkpoints store in one tensor: query, key and value; gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dflash_plugin.errors import DFlashError


def _parts(name: str, rows: int, raw: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    """The fused linear that a tensor belongs to and the rows of its parts; "" and {} for others."""
    if ".qkv_proj." in name:
        layer = raw.get("transformer_layer_config") or raw
        heads, kv_heads = layer.get("num_attention_heads"), layer.get("num_key_value_heads")
        if not (isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads > 0):
            raise DFlashError(
                f"{name} cannot be split: add num_attention_heads and num_key_value_heads to "
                "config.json"
            )
        dim, rest = divmod(rows, heads + 2 * kv_heads)
        if rest:
            raise DFlashError(
                f"{name} has {rows} rows, which {heads} + 2 * {kv_heads} heads do not divide: "
                "correct the head counts"
            )
        sizes = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
        return "qkv_proj", sizes
    if ".gate_up_proj." in name:
        if rows % 2:
            raise DFlashError(f"{name} has {rows} rows: an even number is needed")
        return "gate_up_proj", {"gate_proj": rows // 2, "up_proj": rows // 2}
    return "", {}


def part_rows(name: str, rows: int, raw: Mapping[str, Any]) -> list[int]:
    """Rows of each part of a fused weight, [] where it is not fused.

    Args:
        name: canonical, of the weight.
        rows: of the whole weight.
        raw: config.json.

    Raises:
        DFlashError: the rows cannot be shared out over the parts.
    """
    return list(_parts(name, rows, raw)[1].values())


def split_fused(tensors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Split ``qkv_proj`` and ``gate_up_proj`` into the parts that the other dialects store.

    Args:
        tensors: canonical names.
        raw: config.json.

    Raises:
        DFlashError: a tensor cannot be split, or its parts are there, too.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fused, sizes = _parts(name, len(tensor) if tensor.dim() else 0, raw)
        parts = {name: tensor}
        if fused:
            values = tensor.split(list(sizes.values()))
            parts = {name.replace(fused, part): v for part, v in zip(sizes, values, strict=True)}
        for target, value in parts.items():
            if target in split:
                raise DFlashError(f"tensor {target!r} is there both fused and alone: remove one")
            split[target] = value.contiguous()
    return split
