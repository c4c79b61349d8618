"""vLLM's arguments: the plugin's flags, and the staged draft model that they lead to."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from dflash_plugin.checkpoints.dialects import (
    is_dflash,
    open_spec_verifier,
    suggested_drafts,
)
from dflash_plugin.checkpoints.files import read_json
from dflash_plugin.checkpoints.io import CONFIG
from dflash_plugin.decoding.draft_sampling import DraftSampling
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.target_embedding import embedding_factor
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import staging
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.serving.sources import Source, config_at_hand, config_of
from dflash_plugin.serving.variables import is_off
from dflash_plugin.vllm import compat
from dflash_plugin.vllm.capture_sizes import capture_more
from dflash_plugin.vllm.names import ARCHITECTURE, BLOCK, LOAD_FORMAT
from dflash_plugin.vllm.options import (
    DrafterSpec,
    drafter_spec,
    read_options,
    refuse_misplaced,
)
from dflash_plugin.vllm.protocols import Method
from dflash_plugin.vllm.scale_out import choose_draft_ranks, refuse_unsupported
from dflash_plugin.vllm.surface import verify_frontend

logger = logging.getLogger("vllm.dflash_plugin")
METHOD = "dflash"
NUMBER = "num_speculative_tokens"
SAMPLE_METHOD = "draft_sample_method"
REJECTION_METHOD = "rejection_sample_method"
ADAPTIVE = "enable_adaptive_verification"
NUMBER_BY_BATCH = "num_speculative_tokens_per_batch_size"
ENGINE = "vllm"
# The plugin's flag, vLLM's own, its attribute of EngineArgs, its key in --speculative-config.
FLAGS = (
    ("--speculative-method", "--spec-method", "spec_method", "method"),
    ("--speculative-model", "--spec-model", "spec_model", "model"),
    ("--num-speculative-tokens", "--spec-tokens", "spec_tokens", NUMBER),
)


def add_cli_args(native: Method) -> Method:
    """``EngineArgs.add_cli_args`` that adds the plugin's flags first."""

    @wraps(native)
    def add(parser: Any, *args: Any, **kwargs: Any) -> Any:
        add_flags(parser)
        return native(parser, *args, **kwargs)

    return add


def create_engine_config(native: Method) -> Method:
    """``EngineArgs.create_engine_config`` that puts the flag's number of drafts beside the others.

    Where the main model is a speculators checkpoint, vLLM makes the speculative configuration of it
    and of the given one, and then refuses a flag that gives what is in it.
    """

    @wraps(native)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.speculative_config or {}
        if self.spec_tokens is not None and NUMBER not in normalized(given):
            self.speculative_config = {**given, NUMBER: self.spec_tokens}
            self.spec_tokens = None
        return native(self, *args, **kwargs)

    return create


def maybe_override_with_speculators(native: Method) -> Method:
    """vLLM's function of this name, that also knows Open Spec Config, speculators' newer layout.

    Of a main model that is a drafter it makes the target and the speculative configuration.
    """

    @wraps(native)
    def override(*, model: str, **kwargs: Any) -> Any:
        found = native(model=model, **kwargs)
        if found[0] != model:
            return found
        verifier = open_spec_verifier(config_at_hand(model, kwargs.get("revision")) or {})
        if verifier is None:
            return found
        if Path(verifier).exists() and not compat.current().takes_local_verifiers:
            raise DFlashError(
                f"the drafter {model!r} names the target {verifier!r}, a file here, which vLLM "
                f"{compat.installed()} takes of no checkpoint: serve {verifier!r} with "
                f"--speculative-method dflash --speculative-model {model}"
            )
        return verifier, verifier, {**(found[2] or {}), "method": METHOD, "model": model}

    return override


def create_speculative_config(native: Method) -> Method:
    """``EngineArgs.create_speculative_config`` that stages the plugin's drafter first."""

    @wraps(native)
    def create(self: Any, target_model_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_off():
            prepare(self, target_model_config)
        made = native(self, target_model_config, *args, **kwargs)
        if drafter_spec(made) is not None:
            verify_frontend()
        return made

    return create


def add_flags(parser: Any) -> None:
    """Add the long names of vLLM's ``--spec-*`` flags; the short ones stay."""
    group = parser.add_argument_group("dflash-plugin")
    for flag, native, attribute, key in FLAGS:
        group.add_argument(
            flag,
            dest=attribute,
            type=int if key == NUMBER else str,
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
    is_asked_for = asks_for_dflash(settings)
    if not is_asked_for and (settings.get("method") is not None or compat.row() is None):
        return
    version = compat.current()
    source = source_of(arguments, settings)
    model = redirected(str(settings["model"])) if settings.get("model") else None
    if not is_asked_for and not (model and is_dflash(config_of(model, source) or {})):
        return
    if staging.is_staged(ENGINE, model):
        return
    refuse_misplaced(settings)
    refuse_unsupported(arguments)
    if target_model_config.is_hybrid:
        refuse_steps_without_drafts(settings.get(NUMBER_BY_BATCH) or ())
    options = with_switch(read_options(arguments.additional_config), settings.get(ADAPTIVE))
    if not model:
        raise DFlashError(
            "speculative method 'dflash' needs a drafter: give --speculative-model DIR"
        )
    num_layers = target_model_config.get_total_num_hidden_layers()
    target = staging.TargetShape(
        target_model_config.get_hidden_size(),
        num_layers,
        target_model_config.get_vocab_size(),
        embedding_factor(target_model_config.hf_text_config),
    )
    quantization = settings.pop("quantization", None)

    def check(config: DrafterConfig) -> None:
        setting = "quantization of the speculative configuration"
        staging.check_quantization(config, setting, quantization)

    spec = staging.prepare(
        DrafterSpec,
        model,
        source=source,
        options=options,
        target=target,
        drafts=settings.get(NUMBER),
        check=check,
        load_format=arguments.load_format,
    )
    if spec.config.quantization is not None:
        logger.info(
            "the drafter's checkpoint is quantised (%s), draft_weights is %r",
            spec.config.quantization,
            options.draft_weights,
        )
    choose_draft_ranks(spec.config, arguments.tensor_parallel_size, settings)
    suggested = suggested_drafts(read_json(spec.checkpoint / CONFIG))
    settings[NUMBER] = number_of_drafts(spec.config, settings.get(NUMBER), suggested)
    choose_draft_sampling(settings, options.draft_sampling)
    # Watermarks take no other method than vLLM's standard one.
    if version.verifies_blocks and arguments.watermark_config is None:
        verify_drawn_blocks(settings, options.draft_sampling)
    if options.adaptive_verification:
        settings[ADAPTIVE] = True
        refuse_adaptive(target_model_config.hf_text_config)
    capture_more(arguments, settings[NUMBER] + 1)
    leaves_open = arguments.compilation_config.cudagraph_mode is None
    spec = spec.model_copy(update={"captures_prompts": leaves_open})
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
    for key in ("revision", "code_revision"):
        settings.pop(key, None)
    for key, value in compat.spec_settings(version).items():
        settings.setdefault(key, value)
    for _, _, attribute, _ in FLAGS:
        setattr(arguments, attribute, None)
    arguments.speculative_config = settings


def choose_draft_sampling(settings: dict[str, Any], wanted: DraftSampling) -> None:
    """Set vLLM's ``draft_sample_method`` as the plugin's option says; "auto" leaves it.

    Drawn drafts need a tensor of logits for every request slot, draft and token in vLLM, so that
    "auto" does not ask for them.

    Args:
        settings: the speculative configuration.
        wanted: the option.

    Raises:
        DFlashError: the settings ask for another method.
    """
    given = settings.get(SAMPLE_METHOD)
    if wanted == "auto":
        return
    if given not in (None, wanted):
        raise DFlashError(
            f"draft_sampling is {wanted!r} but {SAMPLE_METHOD} of the speculative configuration is "
            f"{given!r}: leave one out"
        )
    settings[SAMPLE_METHOD] = wanted


def with_switch(options: Options, given: bool | None) -> Options:
    """Options that say whether adaptive verification is on, where vLLM's own setting does.

    Args:
        options: the user's.
        given: ``enable_adaptive_verification`` of the speculative configuration, or None.

    Raises:
        DFlashError: the option says otherwise.
    """
    wanted = options.adaptive_verification
    if given is None or given == wanted:
        return options
    if wanted is not None:
        raise DFlashError(
            f"adaptive_verification is {wanted} but {ADAPTIVE} of the speculative configuration is "
            f"{given}: leave one out"
        )
    return options.model_copy(update={"adaptive_verification": bool(given)})


def verify_drawn_blocks(settings: dict[str, Any], wanted: DraftSampling) -> None:
    """Let vLLM verify blocks whole where the plugin's option asks for drawn drafts.

    Args:
        settings: the speculative configuration; a method that it names stays.
        wanted: the option.
    """
    if wanted == "probabilistic":
        settings.setdefault(REJECTION_METHOD, BLOCK)


def refuse_adaptive(target: Any) -> None:
    """Refuse adaptive verification for a target with chunked attention.

    Its text changed beside passes of fewer rows than a block (Llama 4, vLLM 0.32): vLLM lays chunks
    out on the host, which knows the most rows of a request alone.

    Args:
        target: the target's text configuration.

    Raises:
        DFlashError: the target has chunks.
    """
    size = vars(target).get("attention_chunk_size")
    if size is not None:
        raise DFlashError(
            f"{ADAPTIVE} (or adaptive_verification) is on, and vLLM changes the text of a target "
            f"with chunked attention (attention_chunk_size is {size}) then: leave it out"
        )


def refuse_steps_without_drafts(table: Iterable[Sequence[int]]) -> None:
    """Refuse a table that stops drafting at some batch sizes, for a target with recurrent layers.

    After a step without drafts vLLM goes on from a wrong recurrent state (seen on 0.32, without
    this plugin too).

    Args:
        table: lowest batch size, highest and number of drafts, of each entry.

    Raises:
        DFlashError: an entry has 0 drafts.
    """
    for entry in table:
        if entry[-1] == 0:
            raise DFlashError(
                f"{NUMBER_BY_BATCH} has no drafts in {list(entry)}, which changes the text of a "
                "target with recurrent layers in vLLM: give 1 or more"
            )


def merged(arguments: Any) -> dict[str, Any]:
    """The speculative settings from the flags and ``--speculative-config`` together.

    Raises:
        DFlashError: a setting is given in both.
    """
    settings = normalized(arguments.speculative_config or {})
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


def normalized(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A speculative configuration with vLLM's spelling of its keys."""
    return {key.replace("-", "_"): value for key, value in settings.items()}


def source_of(arguments: Any, settings: Mapping[str, Any]) -> Source:
    """Where vLLM's settings say that the drafter comes from."""
    return Source(
        revision=settings.get("revision"),
        download_dir=arguments.download_dir or None,
        token=arguments.hf_token,
        # As vLLM reads it.
        modelscope=os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in ("1", "true"),
    )


def redirected(model: str) -> str:
    """The model that stands for another one, by vLLM's file ``VLLM_MODEL_REDIRECT_PATH``."""
    from vllm.transformers_utils.utils import maybe_model_redirect

    return str(maybe_model_redirect(model))


def asks_for_dflash(settings: Mapping[str, Any]) -> bool:
    """Whether the method is DFlash, by name or, as in vLLM, by the drafter's name."""
    method, name = settings.get("method"), str(settings.get("model")).lower()
    if method is not None:
        return bool(method == METHOD)
    # vLLM looks for EAGLE's names first.
    return METHOD in name and "eagle-" not in name and "eagle3" not in name


def number_of_drafts(
    config: DrafterConfig, requested: int | None, suggested: int | None = None
) -> int:
    """The number of speculative tokens: those of a whole block, unless fewer are requested.

    Args:
        config: the drafter's.
        requested: by the user; by the checkpoint where that is vLLM's main model.
        suggested: by the checkpoint. Some suggest the block size, which counts the anchor too.

    Raises:
        DFlashError: the user requests more than a block drafts, or none.
    """
    maximum = config.num_draft_tokens
    if requested is None:
        return maximum
    if requested == suggested and requested > maximum:
        logger.warning(
            "the checkpoint suggests %d speculative tokens, but a block of %d drafts %d: %d are "
            "drafted",
            *(requested, config.block_size, maximum, maximum),
        )
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
