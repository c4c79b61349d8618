"""The drafter that a run trains: its configuration and its first weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from dflash_plugin.checkpoints.dialects import write_config
from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.checkpoints.tensors import checkpoint_tensors, load_tensors
from dflash_plugin.checkpoints.vocabulary import fitted, fitted_config
from dflash_plugin.drafter import flex
from dflash_plugin.drafter.blockwise import BlockAttention
from dflash_plugin.drafter.config import (
    DrafterConfig,
    LayerAttention,
    RopeConfig,
    build_config,
    spread_layers,
)
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.config import PARTS, SHAPE, TrainConfig


def drafter_config(target: PreTrainedModel, train: TrainConfig) -> DrafterConfig:
    """The drafter to train for a target.

    Raises:
        DFlashError: settings exclude one another, the target lacks what they name, or the
            checkpoint to start from is not for it or holds what an export cannot express.
    """
    if train.start_from is None:
        config = _config_for(target, train)
    else:
        _require_unset(train, SHAPE, f"{str(train.start_from)!r} decides it: leave it out")
        config = load_config(train.start_from)
        text = target.config.get_text_config()
        config.require_target(text.hidden_size, text.num_hidden_layers)
        config = fitted_config(config, target.get_input_embeddings().weight.shape[0])
    if config.selector is not None:
        _require_unset(train, PARTS, f"{str(train.start_from)!r} decides it: leave it out")
    elif train.dflash2:
        convolution = {"kernel_size": train.conv_kernel_size, "group_size": train.conv_group_size}
        selector = {"rank": train.selector_rank, "top_k": train.selector_top_k}
        config = build_config(
            {**config.model_dump(), "convolution": convolution, "selector": selector}
        )
    else:
        parts = (*PARTS, "selector_weight")
        _require_unset(train, parts, "only a DFlash 2 drafter has it: set dflash2 or leave it out")
    write_config(config, "z-lab")
    return config


def _require_unset(train: TrainConfig, names: Sequence[str], why: str) -> None:
    for name in names:
        if name in train.model_fields_set:
            raise DFlashError(f"{name} is {getattr(train, name)!r}, but {why}")


def _config_for(target: PreTrainedModel, train: TrainConfig) -> DrafterConfig:
    """A drafter with the target's width, heads, rotation and vocabulary."""
    text = target.config.get_text_config()
    ids = train.target_layer_ids or _spread(text.num_hidden_layers, train)
    outside = [i for i in ids if not -1 <= i < text.num_hidden_layers]
    if outside:
        raise DFlashError(
            f"target layer {outside[0]} does not exist: the target has layers 0 to "
            f"{text.num_hidden_layers - 1}"
        )
    if train.mask_token_id is None:
        raise DFlashError(
            "mask_token_id is not given: name a token that the target never writes, or name a "
            "checkpoint to start from"
        )
    vocabulary = target.get_input_embeddings().weight.shape[0]
    if train.mask_token_id >= vocabulary:
        raise DFlashError(
            f"mask_token_id {train.mask_token_id} is outside the target's vocabulary of "
            f"{vocabulary}: choose a token that the target never writes"
        )
    heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(text, "rope_theta", 10000.0))
    return build_config(
        {
            "hidden_size": text.hidden_size,
            "intermediate_size": _intermediate_size(text, train),
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
            "rms_norm_eps": 1e-6,
            "layers": (LayerAttention(sliding_window=train.sliding_window),) * train.num_layers,
            "rope": RopeConfig(theta=theta, max_position_embeddings=text.max_position_embeddings),
            "block_size": train.block_size,
            "mask_token_id": train.mask_token_id,
            "target_layer_ids": ids,
            "num_target_layers": text.num_hidden_layers,
            "target_hidden_size": text.hidden_size,
            "vocab_size": vocabulary,
        }
    )


def _spread(num_layers: int, train: TrainConfig) -> tuple[int, ...]:
    """Evenly spread target layers, each once; by default fewer where the target is shallow.

    Raises:
        DFlashError: ``num_features`` was asked for and is more than the target has to spread.
    """
    for count in range(train.num_features, 0, -1):
        ids = spread_layers(num_layers, count)
        if all(lower < upper for lower, upper in pairwise(ids)):
            break
    if count < train.num_features and "num_features" in train.model_fields_set:
        raise DFlashError(
            f"num_features is {train.num_features}, but of a target with {num_layers} layers only "
            f"{count} can be spread: give {count}, or name the layers with target_layer_ids"
        )
    return ids


def _intermediate_size(text: Any, train: TrainConfig) -> int:
    """Of the drafter's MLP: what is asked for, or the target's."""
    size = train.intermediate_size or getattr(text, "intermediate_size", None)
    # GPT-2's configuration calls it n_inner, and leaves it out where it is 4 * hidden_size.
    return int(size or getattr(text, "n_inner", None) or 4 * text.hidden_size)


def block_attention(
    config: DrafterConfig, train: TrainConfig, device: torch.device
) -> BlockAttention:
    """How the blocks attend: what is asked for, and by default FlexAttention on a GPU.

    Raises:
        DFlashError: FlexAttention is asked for and this drafter or machine cannot have it.
    """
    if train.attention == "dense":
        return "dense"
    obstacle = flex.obstacle(config, device)
    if train.attention == "auto":
        return "flex" if device.type == "cuda" and obstacle is None else "dense"
    if obstacle is not None:
        raise DFlashError(f"attention is 'flex', but {obstacle}: choose dense or auto")
    return "flex"


def new_drafter(config: DrafterConfig, train: TrainConfig) -> Drafter:
    """The drafter before the first step: a checkpoint's weights, where one is started from."""
    drafter = Drafter(config)
    initialize(drafter, train.seed)
    if train.start_from is not None:
        kept = fitted(load_checkpoint(train.start_from, dtype=torch.float32), config.vocab_size)
        load_tensors(drafter, {**checkpoint_tensors(drafter), **kept.tensors})
    return drafter


def initialize(drafter: Drafter, seed: int) -> None:
    """Normal weights of width 0.02, residual outputs narrower by the depth, norms at one.

    A DFlash 2 drafter begins as the DFlash drafter of the same seed: its convolutions are the
    identity, and its selector adds nothing to the logits, as one of the codebooks is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * len(drafter.layers))
    for name, parameter in drafter.named_parameters():
        if parameter.dim() < 2 or name.endswith("base_kernel"):
            continue
        if name.endswith(("kernel_projection.weight", "successor_codebook")):
            parameter.data.zero_()
            continue
        narrow = depth if ("output_proj" in name or "down_proj" in name) else 1.0
        drawn = torch.randn(parameter.shape, generator=generator) * (0.02 / narrow)
        parameter.data.copy_(drawn)
