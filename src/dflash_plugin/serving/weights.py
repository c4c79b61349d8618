"""Fills a drafter on an engine's layers from a checkpoint of any dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.stored_weights import fp8_rows, stored_weights
from dflash_plugin.checkpoints.tensors import checkpoint_names
from dflash_plugin.checkpoints.vocabulary import fitted
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.fp8_rows import FP8, Fp8Rows
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.fp8_weights import is_rounded, plain_weight, rounded_linears
from dflash_plugin.serving.quantised_linears import QuantisedLinears, keeps_stored_rows


def fill(
    drafter: Drafter, spec: DrafterSpec, rank: int, quantised: QuantisedLinears | None = None
) -> None:
    """Read the checkpoint into the drafter's parameters, each by its own loader.

    Args:
        drafter: on an engine's layers; a parameter with a ``weight_loader`` takes its shard itself.
        spec: names the checkpoint.
        rank: tensor-parallel rank of this shard.
        quantised: the linears that take what is stored instead of what it stands for.

    Raises:
        DFlashError: the checkpoint is malformed, or drafts tokens that the target lacks.
    """
    checkpoint = load_checkpoint(
        spec.checkpoint,
        drafter.norm.weight.dtype,
        spec.options.dialect,
        drafts=spec.config.num_draft_tokens,
    )
    copy_tensors(drafter, fitted(checkpoint, spec.config.vocab_size).tensors, rank, quantised)
    if spec.config.quantization is not None:
        _attach_stored_rows(drafter, spec)


def copy_tensors(
    drafter: Drafter,
    tensors: Mapping[str, Tensor],
    rank: int,
    quantised: QuantisedLinears | None = None,
) -> dict[nn.Module, Tensor]:
    """Copy a checkpoint's tensors, all or some, into the parameters that hold them.

    Parameters keep their storage, which CUDA graphs read. Weights that were rounded to FP8 are
    rounded again.

    Args:
        drafter: on an engine's layers; a parameter with a ``weight_loader`` takes its shard itself.
        tensors: canonical names, with the target's vocabulary.
        rank: tensor-parallel rank of this shard.
        quantised: the linears that take theirs as the checkpoint stores them, or None.

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
    if quantised is not None:
        tensors |= quantised.tensors(tensors, rank, config.num_attention_heads // heads)
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


def _attach_stored_rows(drafter: Drafter, spec: DrafterSpec) -> None:
    """Give linears the FP8 rows that the checkpoint stores, as ``stored_rows``, where they count.

    Rounding the dequantised weights again would give others.
    """
    headers = stored_weights(spec.checkpoint, headers_only=True)
    if not keeps_stored_rows(spec, headers, drafter.norm.weight.device) or not fp8_rows(headers):
        return
    rows = fp8_rows(stored_weights(spec.checkpoint))
    if "fc.weight" in rows:
        values = sorted_columns(rows["fc.weight"].values, spec.config.target_layer_ids)
        rows["fc.weight"] = rows["fc.weight"]._replace(values=values)
    names = checkpoint_names(drafter)
    for own, module in rounded_linears(drafter):
        parts = [rows.get(name) for name in names.get(f"{own}.weight", ())]
        if parts and None not in parts:
            module.stored_rows = _shard(cast("list[Fp8Rows]", parts), module.weight)


def _shard(parts: Sequence[Fp8Rows], weight: Tensor) -> Fp8Rows:
    """This rank's part of FP8 rows, as the weight's own loader cuts it."""
    plain, shards = weight.data, parts[0].values.shape[1] // weight.shape[1]
    try:
        weight.data = torch.empty(plain.shape, dtype=FP8, device=plain.device)
        _load(weight, dict(enumerate(part.values for part in parts)), len(parts))
        values = weight.data
        weight.data = torch.empty(len(plain), 1, device=plain.device, dtype=torch.float32)
        # Each rank takes its column, so there is one for each.
        scales = [part.scales[:, None].expand(-1, shards) for part in parts]
        _load(weight, dict(enumerate(scales)), len(parts))
        return Fp8Rows(values, weight.data[:, 0].contiguous())
    finally:
        weight.data = plain


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
