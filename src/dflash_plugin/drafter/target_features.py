"""Context features from a Transformers target's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError


def features_of(
    target: PreTrainedModel, config: DrafterConfig, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a target over texts, without its cache.

    Args:
        target: a causal language model.
        config: of the drafter, which names the layers.
        tokens: int64 [B, S].

    Returns:
        Features [B, S, n * target_hidden] and the last position's logits [B, vocab].

    Raises:
        DFlashError: the drafter reads the last layer before the final norm, and the model has no
            single list of layers to read it from.
    """
    last = target.config.get_text_config().num_hidden_layers - 1
    with last_layer_output(target, config) as before_norm:
        out: Any = target(
            input_ids=tokens, use_cache=False, output_hidden_states=True, logits_to_keep=1
        )
    parts = [
        before_norm[-1] if before_norm and layer == last else out.hidden_states[layer + 1]
        for layer in config.target_layer_ids
    ]
    return torch.cat(parts, dim=-1), out.logits[:, -1]


@contextmanager
def last_layer_output(target: PreTrainedModel, config: DrafterConfig) -> Iterator[list[Tensor]]:
    """The last layer's outputs [B, S, hidden] before the final norm, if the drafter reads them."""
    outputs: list[Tensor] = []
    if not config.reads_before_norm(target.config.get_text_config().num_hidden_layers):
        yield outputs
        return
    layers = decoder_layers(target)
    if layers is None:
        raise DFlashError(
            f"the drafter reads the output of the target's last layer before the final norm, and "
            f"{type(target).__name__} has no single list of layers to take it from: use a serving "
            "engine"
        )

    def take(module: nn.Module, given: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handle = layers[-1].register_forward_hook(take)
    try:
        yield outputs
    finally:
        handle.remove()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list of decoder layers, or None where the model has no single list of that length."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        child
        for child in model.get_decoder().children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    return lists[0] if len(lists) == 1 else None
