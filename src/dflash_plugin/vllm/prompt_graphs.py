"""CUDA graphs of whole passes that read prompts, too.

vLLM captures a pass as a whole where all its requests verify drafts. One that also reads a prompt
is captured in parts, from one attention layer to the next, and the host launches every part and
every attention layer: for 36 layers that takes it longer than the GPU needs for short prompts, and
all requests wait. Where the target's attention takes any mix of lengths in one graph, such passes
are captured as a whole here, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import wraps
from typing import Any

from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import AttentionGroup, GraphManager, Method, VllmConfig

logger = logging.getLogger("vllm.dflash_plugin")

# Share of its rows by which a pass may be padded so that fewer sizes are captured.
PADDING = 1 / 15


def capture_prompts(native: Method) -> Method:
    """``ModelCudaGraphManager.capture`` that also captures passes of prompts as a whole."""

    @wraps(native)
    def capture(
        self: Any,
        model: Any,
        model_state: Any,
        input_buffers: Any,
        intermediate_tensors: Any,
        block_tables: Any,
        attn_groups: Sequence[Sequence[AttentionGroup]],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        spec = drafter_spec(self.vllm_config.speculative_config)
        if spec is not None and spec.captures_prompts:
            reason = reason_against(self, attn_groups)
            if reason is None:
                add_mixed_passes(self)
            else:
                logger.info("passes that read prompts are captured in parts: %s", reason)
        return native(
            self,
            model,
            model_state,
            input_buffers,
            intermediate_tensors,
            block_tables,
            attn_groups,
            *args,
            **kwargs,
        )

    return capture


def reason_against(
    manager: GraphManager, attn_groups: Sequence[Sequence[AttentionGroup]]
) -> str | None:
    """Why passes that read prompts stay captured in parts, or None.

    Args:
        manager: of the target's graphs.
        attn_groups: attention layers of target and drafter, by group of the KV cache.
    """
    from vllm.config import CUDAGraphMode

    config: VllmConfig = manager.vllm_config
    model, parallel = config.model_config, config.parallel_config
    mode = manager.cudagraph_mode
    checks = (
        (mode != CUDAGraphMode.FULL_AND_PIECEWISE, f"cudagraph_mode is {mode.name}"),
        (model.is_multimodal_model, "the host hands images to the target"),
        (model.enable_prompt_embeds, "the host hands embeddings to the target"),
        (config.lora_config is not None, "it is unmeasured with LoRA"),
        (config.kv_transfer_config is not None, "the host hands on the cache layer by layer"),
        (parallel.data_parallel_size > 1, "it is unmeasured with data parallelism"),
        (config.cache_config.kv_sharing_fast_prefill, "vLLM cuts prompts short between layers"),
    )
    reason = next((why for applies, why in checks if applies), None)
    if reason is not None:
        return reason
    for group in (group for groups in attn_groups for group in groups):
        reason = _of_backend(config, group)
        if reason is not None:
            return reason
    return None


def _of_backend(config: VllmConfig, group: AttentionGroup) -> str | None:
    """Why graphs of an attention back end hold no prompts, or None.

    vLLM also counts back ends among those of all lengths whose graphs hold verify passes of mixed
    lengths, but no prompts: FlashInfer's of latent attention, and those that models bring. They
    have builders of their own.
    """
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends import flash_attn, triton_attn

    name, builder = group.backend.__name__, group.get_metadata_builder(0)
    support = builder.get_cudagraph_support(config, group.kv_cache_spec)
    if support != AttentionCGSupport.ALWAYS:
        return f"graphs of {name} hold passes of one length"
    if type(builder) is triton_attn.TritonAttentionMetadataBuilder:
        return None
    if type(builder) is not flash_attn.FlashAttentionMetadataBuilder:
        return f"graphs of {name} are not known to hold prompts"
    if not builder.aot_schedule or 64 < builder.headdim <= 128:
        return None
    # FlashAttention 3 has the schedule of a pass before its graph runs, and lays it out otherwise
    # where no request has more than one row, unless heads have 65 to 128 values
    # (mha_fwd_get_scheduler_metadata in hopper/flash_api.cpp). A graph of more rows misreads that.
    # vLLM makes no schedule ahead for layers with different windows.
    if len(flash_attn._get_sliding_window_configs(config)) > 1:
        return None
    return f"{name} schedules passes of one row a request otherwise"


def add_mixed_passes(manager: GraphManager) -> None:
    """Let a manager capture whole passes of any mix of requests in the place of those in parts.

    Whatever a graph in parts held, one of the whole pass holds: the manager then captures no parts,
    which would take memory and time at start. A manager without graphs in parts is left alone.

    Args:
        manager: with graphs of whole passes that verify drafts, and of parts of all others.
    """
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    of_parts = manager._capture_descs.pop(CUDAGraphMode.PIECEWISE, [])
    if not of_parts:
        return
    passes = [
        BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.FULL, num_tokens=rows, num_reqs=min(rows, manager.max_num_reqs)
        )
        # A pass of one row is padded to two: one row alone has a schedule of its own.
        for rows in spread(part.num_tokens for part in of_parts)
        if rows > 1
    ]
    whole = manager._capture_descs.setdefault(CUDAGraphMode.FULL, [])
    whole += passes
    whole.sort(key=lambda one: one.num_tokens, reverse=True)
    for (tokens, _), found in manager._candidates.items():
        verifying = [one for one in found if one.cg_mode == CUDAGraphMode.FULL]
        found[:] = verifying + [one for one in passes if one.num_tokens >= tokens][:1]
    logger.info("%d graphs hold whole passes that read prompts", len(passes))


def spread(sizes: Iterable[int]) -> list[int]:
    """Some of the sizes, the largest among them, so that none pads what the others held by much.

    Args:
        sizes: rows of passes.

    Returns:
        In ascending order.
    """
    kept: list[int] = []
    ordered = sorted(set(sizes), reverse=True)
    for size, below in zip(ordered, [*ordered[1:], 0], strict=False):
        if not kept or kept[-1] > below * (1 + PADDING):
            kept.append(size)
    return kept[::-1]
