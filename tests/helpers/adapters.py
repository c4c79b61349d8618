"""LoRA adapters of a tiny target, and the target with one merged in."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

RANK, ALPHA = 4, 8
MODULES = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


def write_adapter(directory: Path, target: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Write a random adapter as PEFT does.

    Args:
        directory: of the adapter.
        target: the model it is for.
        seed: of its weights.

    Returns:
        A copy of the target with the adapter merged into its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(target), {}
    for name, weight in merged.named_parameters():
        if name.split(".")[-2] not in MODULES:
            continue
        rows, columns = weight.shape
        down = torch.randn(RANK, columns, generator=generator, device="cpu") / 8
        up = torch.randn(rows, RANK, generator=generator, device="cpu") / 8
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        with torch.no_grad():
            weight += ALPHA / RANK * up @ down
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "target",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(MODULES),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return merged
