"""The start-up check on vLLM: drafts the checkpoint's reference prompts with the whole engine.

The prompts run through the runner as requests do: target pass, injection into the paged cache,
draft with the CUDA graphs that serve. The check runs before the first request, so every cache block
is free.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from dflash_plugin.checkpoints.reference_drafts import ReferenceDraft
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.reference_check import check_drafter
from dflash_plugin.vllm import adaptive
from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import Method
from dflash_plugin.vllm.surface import attach
from dflash_plugin.vllm.worker_facts import worker_facts

logger = logging.getLogger("vllm.dflash_plugin")


def checked_when_warm(native: Method) -> Method:
    """``Worker.compile_or_warm_up_model`` that runs the check when the worker has warmed up.

    From then on it is known how the worker runs both models, which the metrics tell.
    """

    @wraps(native)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = native(self, *args, **kwargs)
        spec = drafter_spec(self.vllm_config.speculative_config)
        if spec is not None:
            check(self, spec)
            attach(self, worker_facts(self))
        return result

    return compile_or_warm_up_model


def check(worker: Any, spec: DrafterSpec) -> None:
    """Compare the engine's drafts with the checkpoint's reference drafts.

    Raises:
        DFlashError: they differ and the option ``known_answers`` is "require".
    """
    config = worker.vllm_config
    limit = worker.model_config.max_model_len

    def drafts(expected: ReferenceDraft) -> list[int] | None:
        if len(expected.prompt) + 1 + len(expected.drafts) > limit:
            return None
        return draft(worker, [*expected.prompt, expected.anchor])

    has_connector = config.kv_transfer_config is not None
    quantized = config.model_config.quantization or "fp8" in str(config.cache_config.cache_dtype)
    num_drafts = config.speculative_config.num_speculative_tokens
    check_drafter(
        spec,
        drafts,
        block_size=num_drafts + (not spec.config.sample_from_anchor),
        dtype=str(config.model_config.dtype),
        is_quantized=bool(quantized),
        how_to_override='additional_config {"dflash_plugin": {"known_answers": "warn"}}',
        logger=logger,
        skip_reason="a KV connector moves the cache" if has_connector else None,
    )


def draft(worker: Any, tokens: list[int]) -> list[int]:
    """The engine's drafts after ``tokens``, whose last one is the anchor.

    All but the last token run as the first chunk of a prompt. The anchor is then the prompt's next
    token, and not the target's own choice.
    """
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    runner, request = worker.model_runner, "_dflash_plugin_check"
    manager = adaptive.of_runner(runner)
    if manager is not None:
        manager.draft_whole_blocks()
    groups = runner.kv_cache_config.kv_cache_groups
    rows = len(tokens) + worker.vllm_config.num_speculative_tokens + 1
    blocks, next_block = [], 1
    for group in groups:
        count = -(-rows // group.kv_cache_spec.block_size)
        blocks.append(list(range(next_block, next_block + count)))
        next_block += count
    step = SchedulerOutput.make_empty()
    step.num_spec_tokens_to_schedule = worker.vllm_config.num_speculative_tokens
    step.num_common_prefix_blocks = [0] * len(groups)
    step.scheduled_new_reqs = [
        NewRequestData(
            req_id=request,
            prompt_token_ids=tokens,
            mm_features=[],
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            pooling_params=None,
            block_ids=tuple(blocks),
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=tokens,
        )
    ]
    step.num_scheduled_tokens = {request: len(tokens) - 1}
    step.total_num_scheduled_tokens = len(tokens) - 1
    worker.execute_model(step)
    worker.sample_tokens(None)
    is_v2 = worker.vllm_config.use_v2_model_runner
    proposed = runner.speculator.draft_tokens if is_v2 else runner._draft_token_ids
    drafts: list[int] = proposed[0].tolist()
    finished = SchedulerOutput.make_empty()
    finished.finished_req_ids = {request}
    worker.execute_model(finished)
    return drafts
