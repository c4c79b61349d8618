"""Fills a drafter on an engine's layers from a checkpoint of any dialect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.tensors import checkpoint_names
from dflash_plugin.checkpoints.vocabulary import fitted
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.drafter_spec import DrafterSpec


def fill(drafter: Drafter, spec: DrafterSpec, rank: int) -> None:
    """Read the checkpoint into the drafter's parameters, each by its own loader.

    Args:
        drafter: on an engine's layers; a parameter with a ``weight_loader`` takes its shard itself.
        spec: names the checkpoint.
        rank: tensor-parallel rank of this shard.

    Raises:
        DFlashError: the checkpoint is malformed, or drafts tokens that the target lacks.
    """
    checkpoint = load_checkpoint(
        spec.checkpoint,
        drafter.norm.weight.dtype,
        spec.options.dialect,
        drafts=spec.config.num_draft_tokens,
    )
    tensors = fitted(checkpoint, spec.config.vocab_size).tensors
    ids = spec.config.target_layer_ids
    tensors["fc.weight"] = sorted_columns(tensors["fc.weight"], ids)
    if spec.config.norm_per_tap:
        norms = [tensors[f"aux_hidden_norms.{tap}.weight"] for tap in by_layer(ids)]
        tensors |= {f"aux_hidden_norms.{tap}.weight": norm for tap, norm in enumerate(norms)}
    heads = drafter.attentions()[0].heads
    parameters = dict(drafter.named_parameters()) | dict(drafter.named_buffers())
    for own, names in checkpoint_names(drafter).items():
        parameter = parameters[own]
        loader = getattr(parameter, "weight_loader", None)
        for shard, name in enumerate(names):
            tensor = tensors[name]
            if own.endswith("sinks"):
                tensor = tensor[rank * heads : (rank + 1) * heads]
            if loader is None:
                parameter.data.copy_(tensor)
            elif len(names) == 1:
                loader(parameter, tensor)
            else:
                loader(parameter, tensor, "qkv"[shard] if len(names) == 3 else shard)


def draft_columns(drafter: Drafter) -> Tensor | None:
    """The target's ids of a reduced draft vocabulary, int64 [draft_vocab_size], or None.

    Args:
        drafter: its weights are loaded.
    """
    if drafter.d2t is None:
        return None
    return drafter.token_ids(torch.arange(len(drafter.d2t), device=drafter.d2t.device))


def by_layer(layer_ids: Sequence[int]) -> list[int]:
    """Places in ``layer_ids`` in ascending order of the layers there."""
    return sorted(range(len(layer_ids)), key=lambda index: layer_ids[index])


def sorted_columns(weight: Tensor, layer_ids: Sequence[int]) -> Tensor:
    """``fc.weight`` with its columns in ascending order of the target layers they read.

    An engine collects the target's outputs as its layers run, in whatever order the checkpoint
    lists them.

    Args:
        weight: [hidden, n * target_hidden], one group of columns per target layer.
        layer_ids: n target layers, in the order of the groups.
    """
    parts = weight.chunk(len(layer_ids), dim=1)
    return torch.cat([parts[index] for index in by_layer(layer_ids)], dim=1)


def check_features(width: int, spec: DrafterSpec) -> None:
    """Check the width of the target's features.

    Args:
        width: numbers of a feature row, n * target_hidden.
        spec: the drafter.

    Raises:
        DFlashError: the features come from another number of layers or another target.
    """
    config = spec.config
    expected = len(config.target_layer_ids) * config.target_hidden_size
    if width != expected:
        raise DFlashError(
            f"the target gave features {width} wide but the drafter reads {expected} "
            f"({len(config.target_layer_ids)} layers of {config.target_hidden_size}): use the "
            "drafter made for this target"
        )
