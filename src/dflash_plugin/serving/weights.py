"""Fills a drafter on an engine's layers from a checkpoint of any dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.tensors import checkpoint_names
from dflash_plugin.checkpoints.vocabulary import fitted
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.fp8_weights import is_rounded, plain_weight


def fill(drafter: Drafter, spec: DrafterSpec, rank: int) -> None:
    """Read the checkpoint into the drafter's parameters, each by its own loader.

    Args:
        drafter: on an engine's layers; a parameter with a ``weight_loader`` takes its shard itself.
        spec: names the checkpoint.
        rank: tensor-parallel rank of this shard.

    Raises:
        DFlashError: the checkpoint is malformed, or drafts tokens that the target lacks.
    """
    checkpoint = load_checkpoint(spec.checkpoint, drafter.norm.weight.dtype, spec.options.dialect)
    copy_tensors(drafter, fitted(checkpoint, spec.config.vocab_size).tensors, rank)


def copy_tensors(
    drafter: Drafter, tensors: Mapping[str, Tensor], rank: int
) -> dict[nn.Module, Tensor]:
    """Copy a checkpoint's tensors, all or some, into the parameters that hold them.

    Parameters keep their storage, which CUDA graphs read. Weights that were rounded to FP8 are
    rounded again.

    Args:
        drafter: on an engine's layers; a parameter with a ``weight_loader`` takes its shard itself.
        tensors: canonical names, with the target's vocabulary.
        rank: tensor-parallel rank of this shard.

    Returns:
        Weights of queries, keys and values before they were rounded, float32 [out, in] by linear.
    """
    config = drafter.config
    ids, tensors = config.target_layer_ids, dict(tensors)
    if "fc.weight" in tensors:
        tensors["fc.weight"] = sorted_columns(tensors["fc.weight"], ids)
    if config.norm_per_tap:
        taps = [f"aux_hidden_norms.{tap}.weight" for tap in range(len(ids))]
        norms = [tensors.pop(taps[tap], None) for tap in by_layer(ids)]
        tensors |= {tap: norm for tap, norm in zip(taps, norms, strict=True) if norm is not None}
    heads = drafter.attentions()[0].heads
    parameters = dict(drafter.named_parameters()) | dict(drafter.named_buffers())
    unrounded: dict[nn.Module, Tensor] = {}
    for own, names in checkpoint_names(drafter).items():
        parts = {part: tensors[name] for part, name in enumerate(names) if name in tensors}
        if not parts:
            continue
        if own.endswith("sinks"):
            parts = {0: parts[0][rank * heads : (rank + 1) * heads]}
        module = drafter.get_submodule(own.rpartition(".")[0])
        if own.endswith(".weight") and is_rounded(module):
            with plain_weight(module) as weight:
                _load(weight, parts, len(names))
                if own.endswith("qkv_proj.weight"):
                    unrounded[module] = weight.data
        else:
            _load(parameters[own], parts, len(names))
    return unrounded


def _load(parameter: Tensor, parts: Mapping[int, Tensor], count: int) -> None:
    """Load tensors, by their places among the ``count`` that one parameter holds."""
    loader = getattr(parameter, "weight_loader", None)
    for part, tensor in parts.items():
        if loader is None:
            parameter.data.copy_(tensor)
        elif count == 1:
            loader(parameter, tensor)
        else:
            loader(parameter, tensor, "qkv"[part] if count == 3 else part)


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
