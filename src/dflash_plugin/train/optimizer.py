"""What steps a drafter's weights, and the schedule of its rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.config import TrainConfig


def make_optimizers(drafter: Drafter, config: TrainConfig) -> list[Optimizer]:
    """AdamW alone, or Muon for the matrices of the layers and AdamW for the rest.

    Muon's steps are scaled to the size of AdamW's ("Muon is Scalable for LLM Training", arXiv
    2502.16982, section 2.2), so that one learning rate serves both.

    Raises:
        DFlashError: this torch has no Muon.
    """
    vectors, tables, matrices = _by_kind(drafter)
    adamw: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "fused": next(drafter.parameters()).device.type == "cuda",
    }
    decay, none = {"weight_decay": config.weight_decay}, {"weight_decay": 0.0}
    plain = {"params": vectors, **none}
    if config.optimizer == "adamw":
        apart = set(vectors)
        decayed = [parameter for parameter in drafter.parameters() if parameter not in apart]
        return [torch.optim.AdamW([{"params": decayed, **decay}, plain], **adamw)]
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise DFlashError(
            f"optimizer is 'muon', but torch {torch.__version__} has none: install torch 2.9 or "
            "later, or choose adamw"
        )
    groups = [{"params": tables, **decay}, plain] if tables else [plain]
    return [
        muon(matrices, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw", **decay),
        torch.optim.AdamW(groups, **adamw),
    ]


def _by_kind(
    drafter: Drafter,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Norms, biases, vectors and a convolution's channels; tables by token; matrices."""
    vectors: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    by_token = {drafter.config.vocab_size, drafter.config.draft_vocab_size}
    for name, parameter in drafter.named_parameters():
        if parameter.dim() < 2 or name.endswith("base_kernel"):
            vectors.append(parameter)
        elif parameter.dim() > 2 or by_token & set(parameter.shape):
            tables.append(parameter)
        else:
            matrices.append(parameter)
    return vectors, tables, matrices


def parameters_of(optimizers: list[Optimizer]) -> Iterator[tuple[Optimizer, nn.Parameter]]:
    """Every parameter with its optimizer, in an order that a snapshot can number."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, parameter


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step after ``step`` steps: a linear warm-up, then a cosine down to a tenth."""
    warm = max(1, round(config.steps * config.warmup))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def set_rate(optimizers: list[Optimizer], rate: float) -> None:
    """Let the next step take this learning rate."""
    groups: list[dict[str, Any]] = [group for one in optimizers for group in one.param_groups]
    for group in groups:
        group["lr"] = rate
