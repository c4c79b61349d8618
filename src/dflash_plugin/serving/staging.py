"""Prepares a drafter for an engine: finds and checks the checkpoint, stages a configuration.

An engine loads a draft model from a directory with a ``config.json``. The plugin writes such a
directory into its cache, with this project's architecture and a ``DrafterSpec`` in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dflash_plugin.checkpoints.dialects.common import FULL, SLIDING, sizes
from dflash_plugin.checkpoints.hub import cache_directory
from dflash_plugin.checkpoints.io import CONFIG, load_config, replacing
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.serving import KEY
from dflash_plugin.serving.drafter_spec import (
    DrafterSpec,
    Options,
    expected_acceptance,
    without_checks,
)

SpecT = TypeVar("SpecT", bound=DrafterSpec)


class TargetShape(NamedTuple):
    """What a drafter must fit.

    Attributes:
        hidden_size: of a target layer's output.
        num_layers: of the target.
        vocab_size: of the target.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int


def prepare(
    spec_class: type[SpecT],
    model: str,
    *,
    revision: str | None,
    download_dir: str | None,
    options: Options,
    target: TargetShape,
    load_format: Any,
    check: Callable[[DrafterConfig], None] | None = None,
) -> SpecT:
    """Find a drafter's checkpoint and check that it fits the target and the engine.

    Args:
        spec_class: the engine's ``DrafterSpec``.
        model: a directory, or the name of a repository on the hub.
        revision: of that repository, or None for its newest.
        download_dir: where the hub's files go, or None for the hub's own cache.
        options: of this engine, as the user gave them.
        target: sizes of the target model.
        load_format: the engine's; with "dummy" weights nothing of the drafter's quality is checked.
        check: raises ``DFlashError`` for a drafter that the engine cannot run.

    Raises:
        DFlashError: the checkpoint is missing, malformed or does not fit; the message says what to
            change.
    """
    checkpoint = resolve(model, revision, download_dir)
    config = load_config(checkpoint, options.dialect)
    config.require_target(*target)
    config = config.with_vocabulary(target.vocab_size)
    if check is not None:
        check(config)
    if is_dummy(load_format):
        options = without_checks(options)
    return spec_class(
        checkpoint=checkpoint,
        config=config,
        options=options,
        expected_acceptance_length=expected_acceptance(checkpoint, options),
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


def resolve(model: str, revision: str | None, download_dir: str | None) -> Path:
    """The drafter's directory, fetched from the hub if it is not one here; "~" is the home.

    Raises:
        DFlashError: there is no such directory, and the hub has no such repository.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        return local.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=["*.json", "*.safetensors"],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DFlashError(
            f"the drafter {model!r} is neither a directory nor a repository that can be fetched "
            f"({reason(error)}): check the name, or fetch it first and give its directory"
        ) from error


def stage(engine: str, config: Mapping[str, Any], files: Iterable[Path] = ()) -> Path:
    """Write a draft model's configuration for an engine into the cache.

    Args:
        engine: names the folder.
        config: the content of config.json, made by ``engine_config``.
        files: files of the checkpoint that the engine's loader must find; they are linked.

    Returns:
        The directory, which is named by a hash of the configuration. Several servers may stage the
        same one at once.

    Raises:
        DFlashError: the cache cannot be written.
    """
    written = json.dumps(config, indent=1, sort_keys=True)
    name = hashlib.sha256(written.encode()).hexdigest()[:16]
    directory, files = _staged(engine) / name, list(files)
    if _holds(directory, written + "\n", files):
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file in files:
            with replacing(directory / file.name) as link:
                link.symlink_to(file)
        with replacing(directory / CONFIG) as path:
            path.write_text(written + "\n")
    except OSError as error:
        raise DFlashError(
            f"{directory} cannot be written ({reason(error)}): set DFLASH_PLUGIN_CACHE to a folder "
            "that can"
        ) from error
    return directory


def _holds(directory: Path, written: str, files: Iterable[Path]) -> bool:
    """Whether a directory has been staged so, which a cache that is only read can serve."""
    config = directory / CONFIG
    return (
        config.is_file()
        and config.read_text() == written
        and all((directory / file.name).resolve() == file.resolve() for file in files)
    )


def is_staged(engine: str, model: Any) -> bool:
    """Whether ``stage`` wrote the directory ``model``; engines may configure themselves twice."""
    path = Path(str(model)) / CONFIG
    if path.parent.parent != _staged(engine):
        return False
    return path.is_file() and KEY in json.loads(path.read_text())


def _staged(engine: str) -> Path:
    return cache_directory() / engine
