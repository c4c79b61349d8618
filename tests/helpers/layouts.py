"""Tiny checkpoints in layouts that are read and not written: Meta's and Poolside's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.helpers.tiny import ENGINE_SIZES, tiny_config, tiny_tensors, write_tiny

# What a file says of Laguna's layers in a DrafterConfig.
LAGUNA: dict[str, Any] = {
    "attention_gate": "per-head",
    "norm_per_tap": True,
    "norm_context": True,
    "last_layer_normed": False,
}


def _sizes(config: Any) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "layer_types": ["sliding_attention"] * len(config.layers),
        "sliding_window": 8,
        "dtype": "float32",
    }


def _write(directory: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    raw = {name: value for name, value in raw.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def write_muse(directory: Path, sizes: dict[str, Any] | None = None, **changes: Any) -> Path:
    """An assistant drafter with the tensors of ``tiny_tensors``.

    Args:
        directory: made.
        sizes: of ``tiny_config``.
        changes: of config.json; None leaves a key out.
    """
    config = tiny_config(**(sizes or {}))
    raw = {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        **_sizes(config),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        **changes,
    }
    tensors = tiny_tensors(config)
    tensors["encoder.fc.weight"] = tensors.pop("fc.weight")
    tensors["encoder.output_norm_enc.weight"] = tensors.pop("hidden_norm.weight")
    return _write(directory, raw, tensors)


def write_laguna(
    directory: Path, sizes: dict[str, Any] | None = None, seed: int = 0, **changes: Any
) -> Path:
    """A Laguna drafter with fused projections; arguments as ``write_muse``'s, and a seed."""
    config = tiny_config(**{**LAGUNA, **(sizes or {})})
    raw = {
        "architectures": ["DFlashLagunaForCausalLM"],
        "model_type": "laguna",
        **_sizes(config),
        "vocab_size": config.vocab_size,
        "gating": config.attention_gate,
        "dflash_config": {
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "num_target_layers": config.num_target_layers,
            "target_layer_ids": list(config.target_layer_ids),
            "causal": True,
        },
        **changes,
    }
    tensors = tiny_tensors(config, seed)
    for index in range(len(config.layers)):
        name = f"layers.{index}.self_attn"
        parts = [tensors.pop(f"{name}.{part}_proj.weight") for part in "qkv"]
        tensors[f"{name}.qkv_proj.weight"] = torch.cat(parts)
    return _write(directory, raw, tensors)


_SERVED = {**ENGINE_SIZES, "target_hidden_size": 64}
_LAST = {**_SERVED, "target_layer_ids": (3, 1)}
# Checkpoints for an engine's tiny target, of which the last two read its last layer.
SERVED: dict[str, Callable[[Path], Path]] = {
    "Muse": lambda at: write_muse(at, _SERVED),
    "Laguna": lambda at: write_laguna(at, _LAST),
    "last layer": lambda at: write_tiny(at, **_LAST),
}
