"""A training run's state in one file, from which it goes on exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.train.config import TrainConfig
from dflash_plugin.train.optimizer import parameters_of

FILE = "snapshot.safetensors"
_DRAFTER = "drafter."


def save_snapshot(
    directory: Path, drafter: Drafter, optimizers: list[Optimizer], meta: dict[str, Any]
) -> None:
    """Replace the snapshot in ``directory``; a reader sees the old one or the new one whole.

    Args:
        directory: is made.
        drafter: its weights.
        optimizers: all of their state.
        meta: what else the run needs, as JSON; with what ``load_snapshot`` compares.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_DRAFTER}{name}": value for name, value in drafter.state_dict().items()}
    for index, (optimizer, parameter) in enumerate(parameters_of(optimizers)):
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{index}.{name}"] = value
    temporary = directory / "snapshot.tmp"
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        temporary,
        metadata={"state": json.dumps(meta)},
    )
    os.replace(temporary, directory / FILE)


def load_snapshot(
    directory: Path, drafter: Drafter, optimizers: list[Optimizer], identity: dict[str, Any]
) -> dict[str, Any] | None:
    """Put a snapshot's weights and state into place.

    Args:
        directory: of the snapshot.
        drafter, optimizers: as they were made at the run's start.
        identity: "config", "data" and "world" of the run that goes on.

    Returns:
        What ``save_snapshot`` was told besides; None where there is no snapshot.

    Raises:
        DFlashError: the file is damaged, or belongs to another configuration, data set or process
            count.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta: dict[str, Any] = json.loads(file.metadata()["state"])
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DFlashError(
            f"{str(path)!r} is not a whole snapshot ({reason(error)}): remove it to train from "
            "the start, or give another --output"
        ) from error
    differing = _differences(meta, identity)
    if differing:
        raise DFlashError(
            f"{str(path)!r} was made with {differing}: give another --output, or remove the "
            "snapshot to train from the start"
        )
    drafter.load_state_dict(
        {k[len(_DRAFTER) :]: v for k, v in tensors.items() if k.startswith(_DRAFTER)}
    )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(_DRAFTER):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    for index, (optimizer, parameter) in enumerate(parameters_of(optimizers)):
        optimizer.state[parameter] = {
            name: value.to(parameter.device) for name, value in state[index].items()
        }
    return meta


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What a snapshot's run did otherwise, setting by setting; empty where nothing."""
    before, now = found.get("config", {}), wanted["config"]
    # A setting that is younger than the snapshot had its default.
    younger = {name: TrainConfig.model_fields[name].default for name in now.keys() - before.keys()}
    before = {**before, **younger}
    parts = [
        f"{name} {before[name]!r} instead of {value!r}"
        for name, value in now.items()
        if before[name] != value
    ]
    if found.get("world") != wanted["world"]:
        parts.append(f"{found.get('world')} processes instead of {wanted['world']}")
    if found.get("data") != wanted["data"]:
        parts.append("other sequences")
    return ", ".join(parts)
