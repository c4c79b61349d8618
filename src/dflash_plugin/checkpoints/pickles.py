"""Pickled tensors, which are read by ``convert`` alone and with no code run."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash_plugin.checkpoints.files import MASK_EMBEDDING, STRAYS
from dflash_plugin.errors import DFlashError, reason

SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# What training programs call the weights in a dictionary with other things.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")
_SAVE = "save its tensors with safetensors.torch.save_file"


def pickle_files(directory: Path, has_shards: bool) -> list[Path]:
    """The pickle files that belong to a checkpoint, the mask embedding's last.

    Args:
        directory: of the checkpoint.
        has_shards: its weights are safetensors, so that other pickles are strays.
    """
    found = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES)
    mask = [path for path in found if path.stem == MASK_EMBEDDING]
    weights = [path for path in found if path not in mask and not path.name.startswith(STRAYS)]
    named = [path for path in weights if path.stem.startswith(("pytorch_model", "model"))]
    return mask if has_shards else [*(named or weights), *mask]


def read_pickles(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of pickle files, under the names that they have there.

    Args:
        paths: from ``pickle_files``.

    Raises:
        DFlashError: a file holds more than tensors, or none.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        stored = _unpickled(path)
        tensors = _tensors(stored)
        if path.stem == MASK_EMBEDDING:
            # By any name: MiMo's is an "embedding" beside the mask token's id.
            if len(tensors) != 1:
                raise DFlashError(
                    f"{path.name} holds {len(tensors)} tensors, not the one that stands for the "
                    f"mask: {_SAVE}"
                )
            tensors = {MASK_EMBEDDING: next(iter(tensors.values())).flatten()}
        if not tensors:
            raise DFlashError(f"{path.name} holds no tensors by name: {_SAVE}")
        found |= tensors
    return found


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DFlashError(
            f"{path.name} cannot be read as tensors alone, as it holds other things or is no "
            f"pickle: {_SAVE}"
        ) from error
    except Exception as error:  # torch raises many kinds here
        raise DFlashError(f"{path.name} cannot be read ({reason(error)}): {_SAVE}") from error


def _tensors(stored: Any) -> dict[str, Tensor]:
    """The tensors by name, of a dictionary, of the weights in one, or of one tensor alone."""
    if isinstance(stored, Tensor):
        return {MASK_EMBEDDING: stored}
    if isinstance(stored, list | tuple):
        return {
            str(place): tensor for place, tensor in enumerate(stored) if isinstance(tensor, Tensor)
        }
    if not isinstance(stored, dict):
        return {}
    tensors = {str(name): part for name, part in stored.items() if isinstance(part, Tensor)}
    inner = [stored[name] for name in _WEIGHTS if isinstance(stored.get(name), dict)]
    return _tensors(inner[0]) if inner and not tensors else tensors
