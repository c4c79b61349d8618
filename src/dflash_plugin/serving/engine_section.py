"""What an engine is told of a drafter's quantisation, for the linears that stay quantised."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from dflash_plugin.checkpoints.dequantize import FP4_GROUP
from dflash_plugin.checkpoints.quantization_config import COMPRESSED_TENSORS
from dflash_plugin.checkpoints.stored_weights import StoredWeights
from dflash_plugin.errors import DFlashError

# The engines' names of ModelOpt's algorithms.
_MODELOPT = {"FP8": "modelopt", "NVFP4": "modelopt_fp4"}


def engine_section(stored: StoredWeights) -> tuple[str, dict[str, Any]]:
    """The engines' name of a checkpoint's method, and a ``quantization_config`` without names.

    The checkpoint's own names layers as its module tree has them. Here its tensors have already
    said which linears are quantised, so the section holds for each linear that gets it.

    Args:
        stored: the checkpoint's quantised weights, headers alone.

    Raises:
        DFlashError: one section cannot hold for all of them.
    """
    section = stored.section
    if stored.method == COMPRESSED_TENSORS:
        return COMPRESSED_TENSORS, _compressed_tensors(stored)
    if stored.method == "fp8":
        keys = "activation_scheme", "weight_block_size"
        said = {key: section[key] for key in keys if section.get(key) is not None}
        return "fp8", {"quant_method": "fp8", "activation_scheme": "dynamic", **said}
    algorithm = str(section.get("quant_algo")).upper()
    if stored.method.startswith("modelopt") and algorithm in _MODELOPT:
        return _MODELOPT[algorithm], {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "group_size": FP4_GROUP,
            "ignore": [],
        }
    named = section.get("quant_algo") or stored.method or "nothing"
    raise DFlashError(f"config.json declares {named!r}, for which there is no engine's linear")


def _compressed_tensors(stored: StoredWeights) -> dict[str, Any]:
    declared = stored.section.get("config_groups") or {}
    groups = [group for group in declared.values() if group.get("weights")]
    if len(groups) != 1:
        raise DFlashError(f"config_groups names {len(groups)} schemes, and one is kept")
    group = deepcopy(groups[0])
    weights = group["weights"]
    if not weights.get("strategy") and not weights.get("group_size"):
        weights |= _strategy(stored)
    name = stored.section.get("format") or group.get("format")
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": name,
        # A name that every linear's matches.
        "config_groups": {"group_0": {**group, "targets": ["re:.*"]}},
        "ignore": [],
    }


def _strategy(stored: StoredWeights) -> dict[str, Any]:
    """What has one scale: compressed-tensors means a whole tensor where nothing is said."""
    parts = next(iter(stored.modules.values()))
    if parts.get("weight_packed", parts["weight_scale"]).dtype == torch.uint8:
        return {"strategy": "tensor_group", "group_size": FP4_GROUP}
    return {"strategy": "tensor" if parts["weight_scale"].numel() == 1 else "channel"}
