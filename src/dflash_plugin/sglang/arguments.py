"""SGLang's arguments: the draft model's configuration that stands behind its path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dflash_plugin.checkpoints.dialects.common import FULL, SLIDING, sizes
from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY
from dflash_plugin.serving.drafter_spec import (
    expected_acceptance,
    is_staged,
    resolve,
    stage,
    without_checks,
)
from dflash_plugin.sglang import compat
from dflash_plugin.sglang.compat import argument, set_argument
from dflash_plugin.sglang.options import ENGINE, DrafterSpec, read_options

ALGORITHM = "DFLASH"
ARCHITECTURE = "DFlashPluginDraftModel"
BLOCK_ARGUMENTS = ("speculative_num_draft_tokens", "speculative_dflash_block_size")


def asks_for_dflash(algorithm: Any) -> bool:
    """Whether ``--speculative-algorithm`` is DFLASH."""
    return isinstance(algorithm, str) and algorithm.upper() == ALGORITHM


def refuse_version(server_args: Any, *_: Any, **__: Any) -> None:
    """Stop an unsupported SGLang, but only where DFlash is asked for."""
    if asks_for_dflash(server_args.speculative_algorithm):
        compat.current()


def handle_speculative_decoding(native: Callable[..., Any], server_args: Any) -> Any:
    """Turn a request for DFlash into one for this project's drafter, then go on as natively."""
    from dflash_plugin.sglang.plugin import require_hooks

    if asks_for_dflash(argument(server_args, "speculative_algorithm")):
        require_hooks()
        prepare(server_args)
    return native(server_args)


def handle_dflash(native: Callable[..., Any], server_args: Any) -> Any:
    """SGLang's own checks, which would refuse a CPU."""
    if argument(server_args, "device") != "cpu":
        return native(server_args)
    from dflash_plugin.sglang.cpu.setup import prepare_cpu

    with compat.as_cuda(server_args):
        result = native(server_args)
    prepare_cpu(server_args)
    return result


def prepare(server_args: Any) -> None:
    """Stage the draft model that SGLang will load.

    Args:
        server_args: SGLang's ``ServerArgs``; the draft model's path is rewritten.

    Raises:
        DFlashError: an option, the checkpoint or the block size does not do; the message says what
            to change.
    """
    model = argument(server_args, "speculative_draft_model_path")
    if model is None:
        raise DFlashError(
            "--speculative-algorithm DFLASH needs a drafter: give --speculative-draft-model-path"
        )
    if is_staged(ENGINE, model):
        return
    if compat.has_dp_attention(server_args):
        raise DFlashError(
            "--enable-dp-attention or --attn-dp-size is set, which dflash-plugin does not run "
            "with: leave it out, or set DFLASH_PLUGIN=off to use SGLang's own DFlash"
        )
    options = read_options()
    checkpoint = resolve(
        str(model),
        argument(server_args, "speculative_draft_model_revision"),
        argument(server_args, "download_dir"),
    )
    config = load_config(checkpoint, options.dialect)
    target = target_config(server_args)
    config.require_target(target.hidden_size, target.num_hidden_layers, target.vocab_size)
    check_layers(config, target.num_hidden_layers)
    asked = [argument(server_args, name) for name in BLOCK_ARGUMENTS]
    for name, value in zip(BLOCK_ARGUMENTS, asked, strict=True):
        check_block(config, f"--{name.replace('_', '-')}", value)
    if asked == [None, None]:
        set_argument(server_args, "speculative_num_draft_tokens", config.block_size)
    if str(argument(server_args, "load_format")).rpartition(".")[2].lower() == "dummy":
        options = without_checks(options)
    info = DrafterSpec(
        checkpoint=checkpoint,
        config=config,
        options=options,
        expected_acceptance_length=expected_acceptance(checkpoint, options),
    )
    context = argument(server_args, "context_length") or 0
    length = max(context, int(getattr(target, "max_position_embeddings", 0) or 0))
    staged = stage(
        ENGINE,
        engine_config(info, target.vocab_size, target.num_hidden_layers, length),
        checkpoint.glob("*.safetensors"),
    )
    set_argument(server_args, "speculative_draft_model_path", str(staged))
    set_argument(server_args, "speculative_draft_model_revision", None)


def target_config(server_args: Any) -> Any:
    """The target's text configuration."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(
        argument(server_args, "model_path"),
        trust_remote_code=argument(server_args, "trust_remote_code"),
        revision=argument(server_args, "revision"),
        model_override_args=json.loads(argument(server_args, "json_model_override_args")),
    )
    return config.get_text_config()


def check_block(config: DrafterConfig, flag: str, asked: int | None) -> None:
    """Check a block size, anchor included.

    Raises:
        DFlashError: the drafter was not made for so many.
    """
    if asked is not None and not 2 <= asked <= config.block_size:
        raise DFlashError(
            f"{flag} is {asked} but the drafter's block is {config.block_size} tokens, anchor "
            f"included: give 2 to {config.block_size}, or leave it out for {config.block_size}"
        )


def check_layers(config: DrafterConfig, num_target_layers: int) -> None:
    """Check what SGLang's targets and attention back ends can express.

    Raises:
        DFlashError: the drafter reads the embedding's or the last layer's output, or its layers
            have different windows.
    """
    last = num_target_layers - 1
    if last in config.target_layer_ids:
        raise DFlashError(
            f"the drafter reads target layers {list(config.target_layer_ids)}, and SGLang gives no "
            f"output of the last one ({last}): use the Transformers engine"
        )
    if -1 in config.target_layer_ids:
        raise DFlashError(
            f"the drafter reads target layers {list(config.target_layer_ids)}, and SGLang gives no "
            "output of the embedding (-1): use vLLM or the Transformers engine"
        )
    windows = sorted({layer.sliding_window for layer in config.layers if layer.sliding_window})
    if len(windows) > 1:
        raise DFlashError(
            f"the draft layers have different windows {windows}, and SGLang has one for a model: "
            "use the Transformers engine"
        )


def engine_config(
    info: DrafterSpec, vocab_size: int, num_target_layers: int, length: int
) -> dict[str, Any]:
    """config.json of the draft model, with what SGLang itself reads of it and our own entry."""
    config = info.config
    window = max((layer.sliding_window or 0 for layer in config.layers), default=0) or None
    return {
        "architectures": [ARCHITECTURE],
        **sizes(config),
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": vocab_size,
        "max_position_embeddings": max(length, config.rope.max_position_embeddings),
        "layer_types": [SLIDING if layer.sliding_window else FULL for layer in config.layers],
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": len(config.layers),
        "is_causal": all(layer.causal for layer in config.layers),
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        "block_size": config.block_size,
        "num_target_layers": num_target_layers,
        "dflash_config": {
            # The mask may lie outside the vocabulary; the model puts it in by its row.
            "mask_token_id": config.mask_token_id if config.mask_token_id < vocab_size else 0,
            "target_layer_ids": sorted(config.target_layer_ids),
        },
        KEY: info.model_dump(mode="json"),
    }


def draft_model_path(server_args: Any) -> Path | None:
    """The draft model's path."""
    path = argument(server_args, "speculative_draft_model_path")
    return None if path is None else Path(path)
