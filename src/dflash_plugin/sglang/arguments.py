"""SGLang's arguments: the staged draft model that they lead to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dflash_plugin.checkpoints.dialects import is_dflash
from dflash_plugin.checkpoints.files import whole_shards
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.target_embedding import embedding_factor
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import staging
from dflash_plugin.serving.sources import Source, config_of
from dflash_plugin.sglang import compat, last_layer, scale_out, surface
from dflash_plugin.sglang.compat import argument, set_argument
from dflash_plugin.sglang.names import ALGORITHM, ARCHITECTURE, ENGINE
from dflash_plugin.sglang.options import DrafterSpec, read_options

QUANTIZATION = "speculative_draft_model_quantization"
BLOCK_ARGUMENTS = ("speculative_num_draft_tokens", "speculative_dflash_block_size")


def asks_for_dflash(algorithm: Any) -> bool:
    """Whether ``--speculative-algorithm`` is DFLASH."""
    return isinstance(algorithm, str) and algorithm.upper() == ALGORITHM


def refuse_version(server_args: Any, *_: Any, **__: Any) -> None:
    """Stop an unsupported SGLang, but only where DFlash is asked for."""
    if asks_for_dflash(server_args.speculative_algorithm):
        compat.current()


def handle_speculative_decoding(native: Callable[..., Any], server_args: Any) -> Any:
    """Turn a request for DFlash into one for this project's drafter, then let SGLang go on."""
    algorithm = argument(server_args, "speculative_algorithm")
    if asks_for_dflash(algorithm):
        prepare(server_args)
    elif algorithm is None:
        refuse_unused_drafter(server_args)
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


def refuse_unused_drafter(server_args: Any) -> None:
    """Refuse a DFlash drafter without an algorithm, which SGLang would leave unused.

    Much of what SGLang decides by the algorithm, such as the memory to reserve, is decided by now.

    Raises:
        DFlashError: a DFlash drafter is given.
    """
    model = argument(server_args, "speculative_draft_model_path")
    if model is not None and is_dflash(config_of(str(model), source_of(server_args)) or {}):
        raise DFlashError(
            f"--speculative-draft-model-path is {str(model)!r}, a DFlash drafter, which SGLang "
            "leaves unused without an algorithm: give --speculative-algorithm DFLASH"
        )


def source_of(server_args: Any) -> Source:
    """Where SGLang's arguments say that the drafter comes from.

    With ``SGLANG_USE_MODELSCOPE`` SGLang has fetched it by now.
    """
    return Source(
        revision=argument(server_args, "speculative_draft_model_revision"),
        download_dir=argument(server_args, "download_dir") or None,
    )


def prepare(server_args: Any) -> None:
    """Stage the draft model that SGLang will load.

    Args:
        server_args: SGLang's ``ServerArgs``; the draft model's path is rewritten.

    Raises:
        DFlashError: an option, the checkpoint or the block size is unusable; the message says what
            to change.
    """
    model = argument(server_args, "speculative_draft_model_path")
    if model is None:
        raise DFlashError(
            "--speculative-algorithm DFLASH needs a drafter: give --speculative-draft-model-path"
        )
    quantization = argument(server_args, QUANTIZATION)
    # SGLang would build quantised linears, of the target's kind where nothing is asked for.
    set_argument(server_args, QUANTIZATION, None)
    if staging.is_staged(ENGINE, model):
        return
    scale_out.check(server_args)
    options = read_options()
    target = target_config(server_args)
    requested = {name: argument(server_args, name) for name in BLOCK_ARGUMENTS}

    def check(config: DrafterConfig) -> None:
        check_layers(config, target.num_hidden_layers)
        if quantization != argument(server_args, "quantization"):
            flag = "--speculative-draft-model-quantization"
            staging.check_quantization(config, flag, quantization)
        last_layer.check(config, target, lambda: runs_eagerly(server_args))
        for name, block_size in requested.items():
            check_block(config, f"--{name.replace('_', '-')}", block_size)

    spec = staging.prepare(
        DrafterSpec,
        str(model),
        source=source_of(server_args),
        options=options,
        target=staging.TargetShape(
            target.hidden_size,
            target.num_hidden_layers,
            target.vocab_size,
            embedding_factor(target),
        ),
        drafts=asked_drafts(requested),
        check=check,
        load_format=argument(server_args, "load_format"),
    )
    if all(block_size is None for block_size in requested.values()):
        set_argument(server_args, "speculative_num_draft_tokens", spec.config.block_size)
    context = argument(server_args, "context_length") or 0
    length = max(context, surface.max_positions(target))
    staged = staging.stage(
        ENGINE,
        engine_config(spec, target, length, argument(server_args, "tp_size")),
        whole_shards(spec.checkpoint),
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


def check_block(config: DrafterConfig, flag: str, block_size: int | None) -> None:
    """Check a requested block size, anchor included; None requests the drafter's own.

    Raises:
        DFlashError: the drafter was not made for blocks of that size.
    """
    if block_size is not None and not 2 <= block_size <= config.block_size:
        raise DFlashError(
            f"{flag} is {block_size} but the drafter's block is {config.block_size} tokens, anchor "
            f"included: give 2 to {config.block_size}, or leave it out for {config.block_size}"
        )


def asked_drafts(requested: Mapping[str, int | None]) -> int | None:
    """The drafts of the block that the arguments ask for, anchor included; None asks for none."""
    blocks = [block for block in requested.values() if block is not None and block >= 2]
    return max(blocks) - 1 if blocks else None


def runs_eagerly(server_args: Any) -> bool:
    """Whether the target runs without CUDA graphs and torch.compile."""
    graphs = argument(server_args, "device") != "cpu" and not argument(
        server_args, "disable_cuda_graph"
    )
    return not graphs and not argument(server_args, "enable_torch_compile")


def check_layers(config: DrafterConfig, num_target_layers: int) -> None:
    """Check what SGLang's targets and attention back ends can express.

    Raises:
        DFlashError: the drafter reads the embedding's output or that of the last layer alone, or
            its layers have different windows.
    """
    last = num_target_layers - 1
    if config.target_layer_ids == (last,):
        staging.refuse_layer(
            config,
            last,
            f"SGLang gives the output of the last one ({last}) only beside another layer's",
            use="vLLM or the Transformers engine",
        )
    staging.refuse_layer(
        config,
        -1,
        "SGLang gives no output of the embedding (-1)",
        use="vLLM or the Transformers engine",
    )
    windows = sorted({layer.sliding_window for layer in config.layers if layer.sliding_window})
    if len(windows) > 1:
        raise DFlashError(
            f"the draft layers have different windows {windows}, and SGLang has one for a model: "
            "use the Transformers engine"
        )


def engine_config(spec: DrafterSpec, target: Any, length: int, ranks: int) -> dict[str, Any]:
    """config.json of the draft model, with what SGLang reads beside the shared keys.

    Args:
        spec: the drafter.
        target: the target's text configuration.
        length: positions that requests may reach.
        ranks: the tensor-parallel degree.
    """
    mask_token_id, vocab_size = spec.config.mask_token_id, target.vocab_size
    staged = staging.engine_config(
        spec,
        architecture=ARCHITECTURE,
        vocab_size=vocab_size,
        max_positions=length,
        # SGLang would look up a mask outside the vocabulary; the model puts it in by its row.
        mask_token_id=mask_token_id if mask_token_id < vocab_size else 0,
        max_window_layers=len(spec.config.layers),
        num_target_layers=target.num_hidden_layers,
    )
    staged |= scale_out.heads_for_ranks(spec.config, ranks)
    staged["dflash_config"]["target_layer_ids"] = last_layer.captured_layers(spec.config, target)
    return staged
