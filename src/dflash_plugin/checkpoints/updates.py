"""New tensors for a drafter that is already loaded, in the layout of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dflash_plugin.checkpoints.dialects import is_dflash
from dflash_plugin.checkpoints.files import read_json
from dflash_plugin.checkpoints.fused import part_rows, split_fused
from dflash_plugin.checkpoints.io import (
    CONFIG,
    IGNORED,
    canonical,
    check_names_and_shapes,
    check_vocabulary_map,
    convert_values,
    load_config,
    without_padding,
)
from dflash_plugin.checkpoints.quantization import dequantise
from dflash_plugin.checkpoints.quantization_config import Declared, declared
from dflash_plugin.checkpoints.vocabulary import fitted_tensors
from dflash_plugin.drafter.config import Dialect, DrafterConfig
from dflash_plugin.errors import DFlashError


class Layout(NamedTuple):
    """How a checkpoint names and stores its tensors.

    Attributes:
        config: of the drafter, as the checkpoint has it.
        raw: config.json.
        quantization: what config.json says of it.
    """

    config: DrafterConfig
    raw: dict[str, Any]
    quantization: Declared


@cache
def layout_of(directory: Path, dialect: Dialect | None, drafts: int) -> Layout:
    """The layout of a checkpoint, which is read once.

    Args:
        directory: of the checkpoint.
        dialect: overrides detection.
        drafts: tokens that a block drafts, for a file that names no block.

    Raises:
        DFlashError: the checkpoint is malformed.
    """
    raw = read_json(directory / CONFIG)
    return Layout(load_config(directory, dialect, drafts=drafts), raw, declared(raw, directory))


def read_update(
    named: Iterable[tuple[str, Tensor]], layout: Layout, running: DrafterConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Check new tensors, and name and cut them as the running drafter has them.

    Args:
        named: any of the checkpoint's tensors, each by its name in the checkpoint's dialect. A
            quantised weight comes with its scales, a fused one whole.
        layout: of the checkpoint.
        running: the drafter's configuration, with the target's vocabulary.
        dtype: of the drafter.

    Returns:
        Canonical names; floating-point tensors in ``dtype``.

    Raises:
        DFlashError: a tensor is not the drafter's, or has another shape or values that are not
            finite.
    """
    stored: dict[str, Tensor] = {}
    for given, tensor in named:
        name = canonical(given)
        if IGNORED.fullmatch(name):
            continue
        if name in stored:
            raise DFlashError(f"tensor {given!r} stands twice among the new ones: send it once")
        stored[name] = tensor
    plain = dequantise(stored, layout.quantization, partial(part_rows, raw=layout.raw))
    tensors = without_padding(split_fused(plain.tensors, layout.raw), layout.config)
    to_target = tensors.pop("t2d", None)
    check_names_and_shapes(tensors, layout.config, whole=False)
    convert_values(tensors, dtype)
    if "d2t" in tensors:
        tensors["d2t"] = tensors["d2t"].cpu()
        to_target = None if to_target is None else to_target.cpu()
        check_vocabulary_map(tensors, to_target, layout.config)
    if layout.config.vocab_size == running.vocab_size:
        return tensors
    return fitted_tensors(tensors, layout.config, running)


def holds_drafter(directory: str | Path) -> bool:
    """Whether a directory holds a DFlash drafter's checkpoint."""
    path = Path(directory) / CONFIG
    try:
        return path.is_file() and is_dflash(read_json(path))
    except DFlashError:
        return False
