"""A target whose linears are int8 by channel, with activations rounded to int8 by token."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [..., n] as int8, and their scales float32 [..., 1]."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


class Int8Linear(nn.Linear):
    """Rounds its input by row and multiplies by rounded weights, which ``weight`` holds again."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        values, scale = rounded(x)
        return F.linear(values.to(x.dtype) * scale, self.weight, self.bias)


def write_int8_target(directory: Path, target: PreTrainedModel) -> PreTrainedModel:
    """Write a target whose linears are rounded, its head apart.

    Args:
        directory: a saved copy of the target; its weights are replaced.
        target: the model.

    Returns:
        A copy of the target that computes with the rounded numbers.
    """
    model = copy.deepcopy(target)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        values, scale = rounded(module.weight.detach())
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = values, scale
        module.__class__ = Int8Linear
        with torch.no_grad():
            module.weight.copy_(values * scale)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"
    return model
