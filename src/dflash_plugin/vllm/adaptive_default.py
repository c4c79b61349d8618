"""Adaptive verification in vLLM where nobody said whether: on where vLLM can run it.

vLLM itself finds out after the model is loaded, and stops if its attention back end cannot. This
asks the back end before the model runner is made, in the worker's process, where the configuration
is settled. A model that brings a back end of its own is found out by vLLM; then blocks are verified
whole.
"""

from __future__ import annotations

import logging
import weakref
from functools import wraps
from typing import Any

from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import Method, VllmConfig

logger = logging.getLogger("vllm.dflash_plugin")
# The runner for which it was turned on, if it was.
_runner: weakref.ref[Any] | None = None


def turned_on_where_able(native: Method) -> Method:
    """``GPUModelRunner.__init__`` of the V2 runner that settles adaptive verification first."""

    @wraps(native)
    def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        global _runner
        is_on = turn_on_where_able(vllm_config)
        native(self, vllm_config, *args, **kwargs)
        _runner = weakref.ref(self) if is_on else None

    return init


def turn_off(reason: object) -> bool:
    """Verify whole blocks in the runner that is being set up, if nobody asked for other ones.

    Args:
        reason: for the log.

    Returns:
        Whether it was on by itself, and is off now.
    """
    runner = None if _runner is None else _runner()
    if runner is None:
        return False
    logger.warning("adaptive verification is off: %s", reason)
    runner.speculative_config.enable_adaptive_verification = False
    runner.rejection_sampler.enable_adaptive_verification = False
    runner.speculator.verify_whole_blocks()
    return True


def turn_on_where_able(vllm_config: VllmConfig) -> bool:
    """Set ``enable_adaptive_verification`` where vLLM can run it and the options leave it open.

    Args:
        vllm_config: settled; the flag of its speculative configuration is set.

    Returns:
        Whether it is on by itself.
    """
    speculative = vllm_config.speculative_config
    spec = drafter_spec(speculative)
    if spec is None or spec.options.adaptive_verification is not None:
        return False
    speculative.enable_adaptive_verification = True  # vLLM's choice of a back end depends on it.
    reason = reason_against(vllm_config)
    speculative.enable_adaptive_verification = reason is None
    if reason is None:
        logger.info("adaptive verification is on (adaptive_verification: false turns it off)")
    else:
        logger.info("adaptive verification is off: %s", reason)
    return reason is None


def reason_against(vllm_config: VllmConfig) -> str | None:
    """Why adaptive verification stays off unless it is asked for, or None.

    Args:
        vllm_config: settled, with adaptive verification on.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    ranks, copies = parallel.tensor_parallel_size, parallel.data_parallel_size
    checks = (
        (
            not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
            "it needs full CUDA graphs",
        ),
        (vllm_config.lora_config is not None, "vLLM does not run it with LoRA"),
        (copies > 1, "with data parallelism of a mixture vLLM's own policy decides, unmeasured"),
        (ranks > 1, f"it is unmeasured with {ranks} ranks"),
        (
            vllm_config.speculative_config.num_speculative_tokens_per_batch_size is not None,
            "num_speculative_tokens_per_batch_size chooses the number of drafts",
        ),
        (model.is_hybrid, "the target has recurrent layers, over which it is unmeasured"),
        (model.use_mla, "the target has latent attention, whose back ends are unmeasured"),
        (
            vars(model.hf_text_config).get("attention_chunk_size") is not None,
            "the target has chunked attention",
        ),
        (
            model.return_sampling_mask or vllm_config.aux_output_config.enabled,
            "vLLM returns sampling masks and routed experts of whole blocks only",
        ),
    )
    return next((why for applies, why in checks if applies), None) or _of_backend(vllm_config)


def _of_backend(vllm_config: VllmConfig) -> str | None:
    """Why the attention back end that vLLM picks does not run passes of mixed lengths, or None."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    model = vllm_config.model_config
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=heads, head_size=model.get_head_size(), dtype=model.dtype
    )
    try:
        with set_current_vllm_config(vllm_config):
            backend = get_attn_backend(
                model.get_head_size(), model.dtype, vllm_config.cache_config.cache_dtype
            )
    except ValueError as error:
        return f"no attention back end takes it: {error}"
    support = backend.get_builder_cls().get_cudagraph_support(vllm_config, spec)
    if support != AttentionCGSupport.ALWAYS:
        return f"graphs of the attention back end {backend.get_name()} hold passes of one length"
    return None
