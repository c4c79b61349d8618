"""What a target's sizes make doubtful in a drafter that still runs: told once a program."""

from __future__ import annotations

from pathlib import Path

from dflash_plugin.checkpoints.notices import warn_once
from dflash_plugin.checkpoints.vocabulary import difference
from dflash_plugin.drafter.config import DrafterConfig


def warn_of_differences(
    directory: Path, config: DrafterConfig, num_layers: int, tokens: int
) -> None:
    """Warn of a target of another depth or vocabulary than the drafter was made for.

    Args:
        directory: of the checkpoint.
        config: as the checkpoint has it.
        num_layers: of the target.
        tokens: of the target's vocabulary.
    """
    depth = config.other_depth(num_layers)
    if depth is not None:
        warn_once(directory, f"num_target_layers: {depth}")
    changed = difference(config, tokens)
    if changed is not None:
        warn_once(directory, changed)
