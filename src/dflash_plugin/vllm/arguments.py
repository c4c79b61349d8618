"""vLLM's arguments: the plugin's flags, and the staged draft model that they lead to."""

from __future__ import annotations

import argparse
from functools import wraps
from typing import Any

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import staging
from dflash_plugin.serving.drafter_spec import DrafterSpec, is_off
from dflash_plugin.vllm import compat
from dflash_plugin.vllm.names import ARCHITECTURE, LOAD_FORMAT
from dflash_plugin.vllm.options import drafter_spec, read_options
from dflash_plugin.vllm.protocols import Method
from dflash_plugin.vllm.surface import verify_frontend

METHOD = "dflash"
ENGINE = "vllm"
# The plugin's flag, vLLM's own, its attribute of EngineArgs, its key in --speculative-config.
FLAGS = (
    ("--speculative-method", "--spec-method", "spec_method", "method"),
    ("--speculative-model", "--spec-model", "spec_model", "model"),
    ("--num-speculative-tokens", "--spec-tokens", "spec_tokens", "num_speculative_tokens"),
)


def add_cli_args(native: Method) -> Method:
    """``EngineArgs.add_cli_args`` that adds the plugin's flags first."""

    @wraps(native)
    def add(parser: Any, *args: Any, **kwargs: Any) -> Any:
        add_flags(parser)
        return native(parser, *args, **kwargs)

    return add


def create_speculative_config(native: Method) -> Method:
    """``EngineArgs.create_speculative_config`` that stages the plugin's drafter first."""

    @wraps(native)
    def create(self: Any, target_model_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_off():
            prepare(self, target_model_config)
        made = native(self, target_model_config, *args, **kwargs)
        if drafter_spec(made) is not None:
            verify_frontend(made)
        return made

    return create


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
            is unusable; the message says what to change.
    """
    settings = merged(arguments)
    model = settings.get("model")
    if not asks_for_dflash(settings) or staging.is_staged(ENGINE, model):
        return
    version = compat.current()
    options = read_options(arguments.additional_config)
    if not model:
        raise DFlashError(
            "speculative method 'dflash' needs a drafter: give --speculative-model DIR"
        )
    num_layers = target_model_config.get_total_num_hidden_layers()
    target = staging.TargetShape(
        target_model_config.get_hidden_size(), num_layers, target_model_config.get_vocab_size()
    )
    spec = staging.prepare(
        DrafterSpec,
        str(model),
        revision=settings.get("revision"),
        download_dir=arguments.download_dir,
        options=options,
        target=target,
        load_format=arguments.load_format,
    )
    settings["num_speculative_tokens"] = number_of_drafts(
        spec.config, settings.get("num_speculative_tokens")
    )
    if options.adaptive_verification:
        settings.setdefault("enable_adaptive_verification", True)
    if not staging.is_dummy(arguments.load_format):
        settings.setdefault("draft_load_config", _load_config())
    settings["method"] = METHOD
    config = staging.engine_config(
        spec,
        architecture=ARCHITECTURE,
        vocab_size=target.vocab_size,
        max_positions=target_model_config.max_model_len,
        mask_token_id=spec.config.mask_token_id,
    )
    settings["model"] = str(staging.stage(ENGINE, config))
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
        value = getattr(arguments, attribute)
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


def number_of_drafts(config: DrafterConfig, requested: int | None) -> int:
    """The number of speculative tokens: those of a whole block, unless fewer are requested.

    Raises:
        DFlashError: more are requested than a block drafts, or none.
    """
    maximum = config.num_draft_tokens
    if requested is None:
        return maximum
    if not 1 <= requested <= maximum:
        raise DFlashError(
            f"num_speculative_tokens is {requested} but a block of {config.block_size} drafts "
            f"{maximum}: give 1 to {maximum}, or leave it out for {maximum}"
        )
    return requested


def _load_config() -> Any:
    from vllm.config.load import LoadConfig

    return LoadConfig(load_format=LOAD_FORMAT)
