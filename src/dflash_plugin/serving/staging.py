"""Prepares a drafter for an engine: finds and checks the checkpoint, stages a configuration.

An engine loads a draft model from a directory with a ``config.json``. The plugin writes such a
directory into its cache, with this project's architecture and a ``DrafterSpec`` in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dflash_plugin.checkpoints.dialects.common import FULL, SLIDING, sizes
from dflash_plugin.checkpoints.files import read_json
from dflash_plugin.checkpoints.hub import CACHE, cache_directory
from dflash_plugin.checkpoints.io import CONFIG, load_config, replacing
from dflash_plugin.checkpoints.target_differences import warn_of_differences
from dflash_plugin.checkpoints.vocabulary import fitted_config
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.serving import KEY
from dflash_plugin.serving.drafter_spec import (
    DrafterSpec,
    Options,
    expected_acceptance,
    without_checks,
)
from dflash_plugin.serving.sources import Source, resolve

SpecT = TypeVar("SpecT", bound=DrafterSpec)


class TargetShape(NamedTuple):
    """What a drafter must fit.

    Attributes:
        hidden_size: of a target layer's output.
        num_layers: of the target.
        vocab_size: of the target.
        embedding_factor: of the target on the rows of its embedding.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    embedding_factor: float = 1.0


def prepare(
    spec_class: type[SpecT],
    model: str,
    *,
    source: Source,
    options: Options,
    target: TargetShape,
    load_format: Any,
    drafts: int | None = None,
    check: Callable[[DrafterConfig], None] | None = None,
) -> SpecT:
    """Find a drafter's checkpoint and check that it fits the target and the engine.

    Args:
        spec_class: the engine's ``DrafterSpec``.
        model: a directory, or the name of a repository on the hub.
        source: how the engine's settings say that repository is fetched.
        options: of this engine, as the user gave them.
        target: sizes of the target model.
        load_format: the engine's; with "dummy" weights nothing of the drafter's quality is checked.
        drafts: that the user asks for; a block's where the checkpoint names no block.
        check: raises ``DFlashError`` for a drafter that the engine cannot run.

    Raises:
        DFlashError: the checkpoint is missing, malformed or does not fit; the message says what to
            change.
    """
    checkpoint = resolve(model, source)
    config = load_config(checkpoint, options.dialect, drafts=drafts)
    config.require_target(target.hidden_size, target.num_layers)
    warn_of_differences(checkpoint, config, target.num_layers, target.vocab_size)
    config = fitted_config(config, target.vocab_size)
    if check is not None:
        check(config)
    if is_dummy(load_format):
        options = without_checks(options)
    return spec_class(
        checkpoint=checkpoint,
        config=config,
        options=options,
        expected_acceptance_length=expected_acceptance(checkpoint, options),
        embedding_factor=target.embedding_factor,
    )


def is_dummy(load_format: Any) -> bool:
    """Whether an engine's ``load_format``, a string or an enumeration, asks for dummy weights."""
    return str(getattr(load_format, "value", load_format)).rpartition(".")[2].lower() == "dummy"


def refuse_layer(
    config: DrafterConfig, layer: int, engine_gives: str, *, use: str = "the Transformers engine"
) -> None:
    """Refuse a drafter that reads a target layer whose output the engine does not give.

    Args:
        config: the drafter's.
        layer: index of the target layer; -1 is the embedding.
        engine_gives: what the engine gives instead, for the message.
        use: the engine to use instead, for the message.

    Raises:
        DFlashError: the drafter reads the layer.
    """
    if layer in config.target_layer_ids:
        raise DFlashError(
            f"the drafter reads target layers {list(config.target_layer_ids)}, and {engine_gives}: "
            f"use {use}"
        )


def check_quantization(config: DrafterConfig, setting: str, asked: str | None) -> None:
    """Check an engine's setting for the quantisation of a draft model.

    The engine itself is never told of one: the option ``draft_weights`` says what becomes of the
    weights.

    Args:
        config: the drafter's.
        setting: what the engine calls it, for the message.
        asked: its value; None where the user left it out.

    Raises:
        DFlashError: the checkpoint is not quantised so.
    """
    names = _methods(config.quantization)
    if asked is None or asked.lower().replace("_", "-") in names:
        return
    is_quantised = (
        "not quantised" if config.quantization is None else f"quantised ({config.quantization})"
    )
    instead = f" or give {names[0]!r}" if names else ""
    raise DFlashError(
        f"{setting} is {asked!r}, but the drafter's checkpoint is {is_quantised}: leave it "
        f"out{instead}; the option draft_weights says what becomes of its weights"
    )


def _methods(quantization: str | None) -> tuple[str, ...]:
    """What engines call a checkpoint's quantisation, with hyphens."""
    method, _, layouts = (quantization or "").partition(" ")
    if method == "modelopt":
        return method, "modelopt-fp4" if "NVFP4" in layouts else "modelopt-fp8"
    return (method,) if method else ()


def engine_config(
    spec: DrafterSpec,
    *,
    architecture: str,
    vocab_size: int,
    max_positions: int,
    mask_token_id: int,
    **engine_keys: Any,
) -> dict[str, Any]:
    """config.json of the draft model: what the engines read, and the spec under ``KEY``.

    Args:
        spec: the drafter.
        architecture: the name under which the engine knows this project's draft model.
        vocab_size: of the target.
        max_positions: positions that requests may reach; the drafter's own limit counts if larger.
        mask_token_id: of the block's rows in the engine's batch.
        engine_keys: what this engine reads beside that.
    """
    config = spec.config
    windows = [layer.sliding_window for layer in config.layers if layer.sliding_window]
    return {
        "architectures": [architecture],
        **sizes(config),
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": vocab_size,
        "max_position_embeddings": max(max_positions, config.rope.max_position_embeddings),
        "layer_types": [SLIDING if layer.sliding_window else FULL for layer in config.layers],
        "sliding_window": max(windows, default=None),
        "use_sliding_window": bool(windows),
        "is_causal": all(layer.causal for layer in config.layers),
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        "block_size": config.block_size,
        "dflash_config": {
            "mask_token_id": mask_token_id,
            # The engines collect the target's outputs as its layers run.
            "target_layer_ids": sorted(config.target_layer_ids),
        },
        **engine_keys,
        KEY: spec.model_dump(mode="json"),
    }


def stage(engine: str, config: Mapping[str, Any], files: Iterable[Path] = ()) -> Path:
    """Write a draft model's configuration for an engine into the cache.

    Where the default cache cannot be written, as with a read-only home, the directory for temporary
    files serves instead.

    Args:
        engine: names the folder.
        config: the content of config.json, made by ``engine_config``.
        files: files of the checkpoint that the engine's loader must find; they are linked.

    Returns:
        The directory, which is named by a hash of the configuration and the files' names. Several
        servers may stage the same one at once.

    Raises:
        DFlashError: no place can be written.
    """
    written, files = json.dumps(config, indent=1, sort_keys=True), list(files)
    named = "\n".join([written, *sorted(file.name for file in files)])
    name = hashlib.sha256(named.encode()).hexdigest()[:16]
    places = [place / engine / name for place in _places()]
    for directory in places:
        if _holds(directory, written + "\n", files):
            return directory
    refusals = []
    for directory in places:
        try:
            _claim(directory.parents[1])
            _write(directory, written + "\n", files)
        except OSError as error:
            refusals.append(f"{str(directory)!r} cannot be written ({reason(error)})")
        else:
            return directory
    raise DFlashError(f"{'; '.join(refusals)}: set DFLASH_PLUGIN_CACHE to a folder that can")


def _write(directory: Path, written: str, files: Iterable[Path]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        with replacing(directory / file.name) as link:
            link.symlink_to(file)
    with replacing(directory / CONFIG) as path:
        path.write_text(written)


def _holds(directory: Path, written: str, files: Iterable[Path]) -> bool:
    """Whether a directory has been staged so, which a cache that is only read can serve."""
    try:
        return (directory / CONFIG).read_text() == written and all(
            (directory / file.name).resolve() == file.resolve() for file in files
        )
    except OSError:
        return False


def is_staged(engine: str, model: Any) -> bool:
    """Whether ``stage`` wrote the directory ``model``; engines may configure themselves twice."""
    directory = Path(str(model))
    if directory.parent not in [place / engine for place in _places()]:
        return False
    try:
        return KEY in read_json(directory / CONFIG)
    except DFlashError:
        return False


def _places() -> list[Path]:
    """Where directories are staged, best first.

    Raises:
        DFlashError: there is no place, as the user has neither a home nor temporary files.
    """
    if os.environ.get(CACHE, "").strip():
        return [cache_directory()]
    places = []
    with suppress(DFlashError):
        places.append(cache_directory())
    stand_in = _stand_in()
    if stand_in is not None and (not os.path.lexists(stand_in) or _is_private(stand_in)):
        places.append(stand_in)
    return places or [cache_directory()]


def _stand_in() -> Path | None:
    """This user's place among temporary files, or None where there are none."""
    try:
        return Path(tempfile.gettempdir()) / f"dflash-plugin-{os.getuid()}"
    except FileNotFoundError:
        return None


def _claim(place: Path) -> None:
    """Make the place among temporary files this user's alone, as everybody can write beside it.

    Raises:
        OSError: another user has taken it.
    """
    if place == _stand_in():
        place.mkdir(mode=0o700, exist_ok=True)
        if not _is_private(place):
            raise PermissionError(f"{str(place)!r} can be written by others")


def _is_private(place: Path) -> bool:
    status = place.lstat()
    is_directory, others = stat.S_ISDIR(status.st_mode), status.st_mode & 0o022
    return is_directory and not others and status.st_uid == os.getuid()
