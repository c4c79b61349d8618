"""vLLM's arguments: the flags, and the draft model's configuration that stands behind them."""

from __future__ import annotations

import argparse
from functools import wraps
from types import ModuleType
from typing import Any

from dflash_plugin.checkpoints.dialects.common import FULL, SLIDING, sizes
from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY
from dflash_plugin.serving.drafter_spec import (
    DrafterSpec,
    expected_acceptance,
    is_off,
    is_staged,
    resolve,
    stage,
    without_checks,
)
from dflash_plugin.vllm import compat
from dflash_plugin.vllm.options import read_options
from dflash_plugin.vllm.plugin import ARCHITECTURE, LOAD_FORMAT

METHOD = "dflash"
ENGINE = "vllm"
# Ours, vLLM's own, its attribute, and the key of the speculative configuration.
FLAGS = (
    ("--speculative-method", "--spec-method", "spec_method", "method"),
    ("--speculative-model", "--spec-model", "spec_model", "model"),
    ("--num-speculative-tokens", "--spec-tokens", "spec_tokens", "num_speculative_tokens"),
)


def patch(module: ModuleType) -> None:
    """Wrap ``EngineArgs`` of ``vllm.engine.arg_utils``."""
    arguments: Any = module.EngineArgs
    add_cli_args, create = arguments.add_cli_args, arguments.create_speculative_config

    @wraps(add_cli_args)
    def add(parser: Any, *args: Any, **kwargs: Any) -> Any:
        add_flags(parser)
        return add_cli_args(parser, *args, **kwargs)

    @wraps(create)
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        if not is_off():
            prepare(self, target_model_config)
        return create(self, target_model_config, target_parallel_config)

    arguments.add_cli_args = staticmethod(add)
    arguments.create_speculative_config = create_speculative_config


def add_flags(parser: Any) -> None:
    """Add the long names of vLLM's ``--spec-*`` flags; the short ones stay."""
    group = parser.add_argument_group("dflash-plugin")
    for flag, native, attribute, key in FLAGS:
        group.add_argument(
            flag,
            dest=attribute,
            type=int if key == "num_speculative_tokens" else str,
            default=argparse.SUPPRESS,
            help=f"The same as {native}.",
        )


def prepare(arguments: Any, target_model_config: Any) -> None:
    """Turn a request for DFlash into one for this project's drafter.

    Args:
        arguments: vLLM's ``EngineArgs``; its speculative settings are rewritten.
        target_model_config: the target's ``ModelConfig``.

    Raises:
        DFlashError: the version, an option, the checkpoint or the number of speculative tokens
            does not do; the message says what to change.
    """
    settings = merged(arguments)
    model = settings.get("model")
    if not asks_for_dflash(settings) or is_staged(ENGINE, model):
        return
    version = compat.current()
    options = read_options(arguments.additional_config)
    if not model:
        raise DFlashError(
            "speculative method 'dflash' needs a drafter: give --speculative-model DIR"
        )
    checkpoint = resolve(str(model), settings.get("revision"), arguments.download_dir)
    config = load_config(checkpoint, options.dialect)
    config.require_target(
        target_model_config.get_hidden_size(),
        target_model_config.get_total_num_hidden_layers(),
        target_model_config.get_vocab_size(),
    )
    check_layers(config, target_model_config.get_total_num_hidden_layers())
    settings["num_speculative_tokens"] = number_of_drafts(
        config, settings.get("num_speculative_tokens")
    )
    if options.adaptive_verification:
        settings.setdefault("enable_adaptive_verification", True)
    dummy = str(getattr(arguments.load_format, "value", arguments.load_format)) == "dummy"
    if dummy:
        options = without_checks(options)
    else:
        settings.setdefault("draft_load_config", _load_config())
    info = DrafterSpec(
        checkpoint=checkpoint,
        config=config,
        options=options,
        expected_acceptance_length=expected_acceptance(checkpoint, options),
    )
    settings["method"] = METHOD
    settings["model"] = str(stage(ENGINE, engine_config(info, target_model_config)))
    settings.pop("revision", None)
    for key, value in compat.spec_settings(version).items():
        settings.setdefault(key, value)
    for _, _, attribute, _ in FLAGS:
        setattr(arguments, attribute, None)
    arguments.speculative_config = settings


def merged(arguments: Any) -> dict[str, Any]:
    """The speculative settings from the flags and ``--speculative-config`` together.

    Raises:
        DFlashError: a setting is given in both.
    """
    given = arguments.speculative_config or {}
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    for flag, native, attribute, key in FLAGS:
        value = getattr(arguments, attribute, None)
        if value is None:
            continue
        if key in settings:
            raise DFlashError(
                f"{flag} (or {native}) and --speculative-config both give {key!r}: leave one out"
            )
        settings[key] = value
    return settings


def asks_for_dflash(settings: dict[str, Any]) -> bool:
    """Whether the method is DFlash, by name or, as in vLLM, by the drafter's name."""
    method = settings.get("method")
    return method == METHOD or (method is None and "dflash" in str(settings.get("model")).lower())


def check_layers(config: DrafterConfig, num_target_layers: int) -> None:
    """Check that vLLM's targets give what the drafter reads.

    Raises:
        DFlashError: it reads the last layer's output, which drafters know behind the target's norm
            and vLLM gives before it.
    """
    last = num_target_layers - 1
    if last in config.target_layer_ids:
        raise DFlashError(
            f"the drafter reads target layers {list(config.target_layer_ids)}, and vLLM gives the "
            f"output of the last one ({last}) without the target's norm, with which drafters are "
            "trained: use the Transformers engine"
        )


def number_of_drafts(config: DrafterConfig, asked: int | None) -> int:
    """The number of speculative tokens, that of the drafter's block unless fewer are asked for.

    Raises:
        DFlashError: more than a block drafts, or none.
    """
    most = config.num_draft_tokens
    if asked is None:
        return most
    if not 1 <= asked <= most:
        raise DFlashError(
            f"num_speculative_tokens is {asked} but a block of {config.block_size} drafts {most}: "
            f"give 1 to {most}, or leave it out for {most}"
        )
    return asked


def engine_config(info: DrafterSpec, target_model_config: Any) -> dict[str, Any]:
    """config.json of the draft model, with what vLLM itself reads of it and our own entry."""
    config = info.config
    windows = [layer.sliding_window for layer in config.layers if layer.sliding_window]
    length = max(config.rope.max_position_embeddings, target_model_config.max_model_len)
    return {
        "architectures": [ARCHITECTURE],
        **sizes(config),
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": target_model_config.get_vocab_size(),
        "max_position_embeddings": length,
        "layer_types": [
            FULL if layer.sliding_window is None else SLIDING for layer in config.layers
        ],
        "sliding_window": max(windows, default=None),
        "use_sliding_window": bool(windows),
        "is_causal": all(layer.causal for layer in config.layers),
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        "block_size": config.block_size,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": sorted(config.target_layer_ids),
        },
        KEY: info.model_dump(mode="json"),
    }


def _load_config() -> Any:
    from vllm.config.load import LoadConfig

    return LoadConfig(load_format=LOAD_FORMAT)
