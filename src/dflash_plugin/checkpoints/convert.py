"""Writing a drafter in another dialect, checked by reading it back."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from dflash_plugin.checkpoints.files import local_path
from dflash_plugin.checkpoints.io import load_checkpoint, save_checkpoint
from dflash_plugin.drafter.config import Dialect, DrafterConfig
from dflash_plugin.errors import DFlashError

# What goes along with the weights unchanged.
COMPANIONS = (
    "known_answer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def convert(
    source: str | Path,
    output: str | Path,
    dialect: Dialect,
    source_dialect: Dialect | None = None,
    overwrite: bool = False,
) -> DrafterConfig:
    """Read a drafter in any dialect and write it in another; pickled tensors are read, too.

    Quantised weights are written as the plain ones that they stand for.

    Args:
        source: a checkpoint.
        output: another directory.
        dialect: the dialect to write.
        source_dialect: overrides detection.
        overwrite: replace a checkpoint in ``output``.

    Returns:
        The configuration as it reads back.

    Raises:
        DFlashError: the source is malformed, or the dialect cannot express it.
    """
    source, output = local_path(source), local_path(output)
    if source.resolve() == output.resolve():
        raise DFlashError(f"{output} is the source itself: choose another directory")
    checkpoint = load_checkpoint(source, dialect=source_dialect, pickles=True)
    save_checkpoint(output, checkpoint.config, checkpoint.tensors, dialect, overwrite)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    written = load_checkpoint(output, dialect=dialect)
    _check_same(checkpoint.config, written.config)
    for name, tensor in checkpoint.tensors.items():
        if not torch.equal(tensor, written.tensors[name]):
            raise DFlashError(f"{output}: tensor {name!r} reads back different: write it again")
    return written.config


def _check_same(before: DrafterConfig, after: DrafterConfig) -> None:
    """The two must mean the same drafter."""
    free = {"dialect", "num_target_layers", "quantization"}
    if not any(layer.sliding_window for layer in before.layers):
        free.add("window_from")
    if {before.embedding_scale, after.embedding_scale} == {None, 1.0}:
        # They differ under a Gemma target alone, and speculators has no word for the other.
        free.add("embedding_scale")
    old, new = before.model_dump(exclude=free), after.model_dump(exclude=free)
    for name, value in old.items():
        if value != new[name]:
            raise DFlashError(
                f"{name} is {value!r} in the source but {new[name]!r} in the {after.dialect} "
                "dialect: the dialect cannot express this drafter"
            )
