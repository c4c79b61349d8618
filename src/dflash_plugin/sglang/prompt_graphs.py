"""CUDA graphs of whole passes that read prompts.

SGLang captures such a pass in parts, from one attention layer to the next, and the host launches
every part and every attention layer. For 36 layers that takes the host longer than the GPU needs
for short prompts, and all other requests wait. Under FlashAttention SGLang can also capture the
pass as a whole, and says that this is experimental. The plugin lets it do so where the user leaves
it open, for targets and servers like those that it was measured with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from dflash_plugin.sglang.compat import argument, current
from dflash_plugin.sglang.protocols import ModelRunnerLike
from dflash_plugin.sglang.surface import is_instance, surface

logger = logging.getLogger(__name__)

RUNNER_MODULE = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner"
# Prompts of a pass, at most; one of more prompts runs without a graph.
MOST_PROMPTS = 32
# Names that configurations give the number of their experts.
EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)
# Arguments of caches that fetch keys and values from elsewhere while a pass runs, or may. Each of
# its layers waits for its own, on the host, which a pass that is captured whole leaves out.
OTHER_CACHES = (
    "enable_hierarchical_cache",
    "enable_lmcache",
    "enable_flexkv",
    "radix_cache_backend",
    "enable_unified_cache_external_linker",
)


def capture_prompts(target: ModelRunnerLike) -> bool:
    """Let SGLang capture the target's passes over prompts as a whole, where that is known to work.

    Args:
        target: with its attention back end, before its graphs are captured.

    Returns:
        Whether it will.
    """
    from sglang.srt.runtime_context import get_exec

    config = get_exec().graph.cuda_graph_config.prefill
    reason = reason_against(target, config)
    if reason is not None:
        logger.info("passes over prompts are captured as SGLang does: %s", reason)
        return False
    read = [config]
    if not current().declares_arguments:
        # These versions read it from the arguments, too.
        read.append(target.server_args.cuda_graph_config.prefill)
    for one in read:
        one.backend = "full"
        one.full_prefill_max_req = one.full_prefill_max_req or MOST_PROMPTS
    surface().patch(RUNNER_MODULE, "PrefillCudaGraphRunner._run_forward", with_shared_output)
    logger.info(
        "passes over up to %d prompts are captured whole "
        "(--cuda-graph-backend-prefill breakable turns that off)",
        config.full_prefill_max_req,
    )
    return True


def reason_against(target: ModelRunnerLike, config: Any) -> str | None:
    """Why passes over prompts stay captured as SGLang does by itself, or None.

    Args:
        target: with its attention back end.
        config: SGLang's settings of graphs for prompts.
    """
    args, attention, model = target.server_args, target.attn_backend, target.model_config
    if argument(args, "cuda_graph_backend_prefill") is not None or is_locked(args):
        return f"the arguments ask for {config.backend!r}"
    if config.backend != "breakable":
        return f"SGLang chose {config.backend!r}"
    if not is_instance(attention, "FlashAttentionBackend"):
        return f"the attention back end is {type(attention).__name__}"
    checks = (
        (attention.fa_impl_ver != 3, "it is unmeasured with FlashAttention 4"),
        (attention.use_mla, "the target has latent attention"),
        (
            attention.use_sliding_window_kv_pool or attention.is_prefill_aware_swa,
            "the target has windows",
        ),
        (attention.has_local_attention, "the target has chunked attention"),
        (attention.is_encoder_decoder, "the target has an encoder"),
        (model.is_multimodal, "the target reads images"),
        (any(vars(model.hf_text_config).get(name) for name in EXPERTS), "the target has experts"),
        (argument(args, "tp_size") > 1, "it is unmeasured with several ranks"),
        (argument(args, "enable_lora"), "it is unmeasured with LoRA"),
        (
            any(argument(args, name) for name in OTHER_CACHES if hasattr(args, name)),
            "the cache comes layer by layer",
        ),
        # It leaves no memory for passes of more prompts, which run without a graph.
        (target.token_to_kv_pool.post_capture_active, "the cache takes what graphs leave"),
        (argument(args, "disaggregation_mode") != "null", "the cache goes layer by layer"),
        (argument(args, "debug_cuda_graph"), "graphs are debugged"),
        (argument(args, "enable_two_batch_overlap"), "two batches overlap"),
        (argument(args, "enable_mixed_chunk"), "passes over prompts decode, too"),
    )
    return next((why for applies, why in checks if applies), None)


def is_locked(server_args: Any) -> bool:
    """Whether ``--cuda-graph-config`` says how passes over prompts are captured."""
    return ("prefill", "backend") in vars(server_args).get("_cuda_graph_config_locked", ())


def with_shared_output(native: Callable[..., Any]) -> Callable[..., Any]:
    """``_run_forward`` of SGLang's runner, whose captured passes share the memory of their output.

    Up to 0.5.21, SGLang keeps the output of each captured pass apart where it is more than one
    tensor, as it is with context features: for SGLang's 58 passes of up to 8,192 rows, that is
    twelve times the largest output.

    Args:
        native: makes a pass of the target's layers; captured with what it returns.
    """

    @wraps(native)
    def run(runner: Any, forward_batch: Any, num_tokens: int) -> Any:
        out = native(runner, forward_batch, num_tokens)
        if not runner._is_full_backend:
            return out
        # SGLang runs a pass before it captures it: this memory is none of a graph's.
        if "_dflash_output" not in vars(runner):
            runner._dflash_output = _memory_for(out, runner.max_num_tokens)
        return _copied(out, runner._dflash_output)

    return run


def _memory_for(out: Any, rows: int) -> Any:
    if isinstance(out, torch.Tensor):
        return out.new_empty(rows, *out.shape[1:])
    return [_memory_for(part, rows) for part in out] if isinstance(out, list | tuple) else None


def _copied(out: Any, memory: Any) -> Any:
    """An output with its tensors [T, ...] copied to the first rows of the memory's."""
    if isinstance(out, torch.Tensor):
        return memory[: len(out)].copy_(out)
    if isinstance(out, list | tuple):
        parts = [_copied(part, at) for part, at in zip(out, memory, strict=True)]
        return tuple(parts) if isinstance(out, tuple) else parts
    return out
