"""The start-up check on SGLang: drafts the checkpoint's reference prompts with the whole server.

The prompts run through the scheduler as requests do: target pass, injection into the paged cache,
draft with the CUDA graphs that serve. The check runs before the first request.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from dflash_plugin.checkpoints.reference_drafts import ReferenceDraft
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.reference_check import check_drafter
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.options import DrafterSpec

IDLE_TURNS = 10
logger = logging.getLogger("sglang.dflash_plugin")


def check(scheduler: Any, spec: DrafterSpec) -> None:
    """Compare the server's drafts with the checkpoint's reference drafts.

    Raises:
        DFlashError: they differ and the option ``known_answers`` is "require".
    """
    worker, args = scheduler.draft_worker, scheduler.server_args
    runner = worker.target_worker.model_runner
    limit = int(runner.model_config.context_len)

    def drafts(expected: ReferenceDraft) -> list[int] | None:
        if len(expected.prompt) + 1 + worker.block_size > limit:
            return None
        block = draft(scheduler, expected.prompt)
        # In half precision the target may continue a prompt with another token than recorded.
        if block[0] != expected.anchor:
            return None
        # A drafter that drafts from its anchor has one draft more than SGLang's blocks hold; the
        # recorded one stands in for it.
        return [*block[1:], *expected.drafts[len(block) - 1 :]]

    quantized = argument(args, "quantization") or "fp8" in str(argument(args, "kv_cache_dtype"))
    check_drafter(
        spec,
        drafts,
        block_size=worker.block_size,
        dtype=str(runner.dtype),
        is_quantized=bool(quantized),
        how_to_override="DFLASH_PLUGIN_KNOWN_ANSWERS=warn",
        logger=logger,
        if_none_compared=(
            "the target continues every known prompt otherwise than recorded: it is not the one "
            "that the drafter was made for"
        ),
    )


def draft(scheduler: Any, prompt: list[int]) -> list[int]:
    """The block [anchor, drafts] that the server verifies first after a prompt."""
    request = make_request(scheduler, prompt, max_new_tokens=2, temperature=0.0, ignore_eos=True)
    return run(scheduler, [request])[0]


def make_request(scheduler: Any, prompt: list[int], **params: Any) -> Any:
    """A request as a client's request reaches the scheduler.

    Args:
        scheduler: SGLang's.
        prompt: token ids.
        params: arguments of ``SamplingParams``.
    """
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(**params)
    sampling.normalize(scheduler.tokenizer)
    request = Req(
        rid=f"dflash-plugin-{uuid4().hex}",
        origin_input_text="",
        origin_input_ids=array("q", prompt),
        sampling_params=sampling,
        vocab_size=scheduler.draft_worker.vocab_size,
    )
    request.tokenizer = scheduler.tokenizer
    return request


def run(scheduler: Any, requests: list[Any], *, whole: bool = True) -> list[list[int]]:
    """Run requests through a scheduler that is not serving yet, then empty its cache.

    Args:
        scheduler: SGLang's.
        requests: made by ``make_request``.
        whole: verify whole blocks, whatever the policy says.

    Returns:
        The blocks [anchor, drafts] that were verified for the batch's first request.

    Raises:
        DFlashError: the scheduler does not run the requests.
    """
    worker = scheduler.draft_worker
    blocks: list[list[int]] = []
    verifier = worker.verifier
    kept = verifier is not None and verifier.whole_blocks
    if verifier is not None:
        verifier.whole_blocks = kept or whole
    try:
        serve(
            scheduler, requests, lambda: blocks.append(worker._draft_block_tokens_buf[0].tolist())
        )
    finally:
        if verifier is not None:
            verifier.whole_blocks = kept
    scheduler.flush_cache()
    return blocks


def serve(scheduler: Any, requests: list[Any], after_decode: Callable[[], None]) -> None:
    """Run requests through a scheduler that is not serving yet, in the mode in which it serves.

    Args:
        scheduler: SGLang's.
        requests: made by ``make_request``.
        after_decode: called after each pass that is not a prefill.

    Raises:
        DFlashError: the scheduler does not run the requests.
    """
    from sglang.srt.utils.common import DynamicGradMode

    streamer = type(scheduler.output_streamer)
    # SGLang's overlapping loop makes this queue when it starts, which is later.
    scheduler.result_queue = deque()
    native = streamer.stream_output
    streamer.stream_output = lambda *_, **__: None
    try:
        with DynamicGradMode():
            for request in requests:
                scheduler._add_request_to_queue(request)
            idle = 0
            while not all(request.finished() for request in requests):
                batch = _next_batch(scheduler)
                # A turn without a batch may have removed finished requests.
                idle = idle + 1 if batch is None else 0
                if batch is None and idle < IDLE_TURNS:
                    continue
                if batch is None:
                    raise DFlashError(
                        f"the scheduler does not run a prompt of "
                        f"{len(requests[0].origin_input_ids)} tokens at start: give the KV cache "
                        "more memory, or set DFLASH_PLUGIN_KNOWN_ANSWERS=off"
                    )
                is_prefill = batch.forward_mode.is_extend()
                result = scheduler.run_batch(batch)
                if not is_prefill:
                    after_decode()
                scheduler.process_batch_result(batch.copy(), result)
            while _next_batch(scheduler) is not None:
                pass
    finally:
        streamer.stream_output = native


def _next_batch(scheduler: Any) -> Any:
    """The batch to run next, or None; one turn of SGLang's own loops."""
    plan = scheduler.get_next_batch_to_run(
        running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
    )
    scheduler.running_batch, scheduler.last_batch = plan.running_batch, plan.batch_to_run
    return plan.batch_to_run
