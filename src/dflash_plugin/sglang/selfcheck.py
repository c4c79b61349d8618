"""The start-up check: the drafter's known answers, drafted by the whole server.

The recorded prompts run through the scheduler as requests do: target pass, injection into the paged
cache, draft with the CUDA graphs that serve. No request has come by then.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from typing import Any
from uuid import uuid4

from dflash_plugin.checkpoints.reference_drafts import ReferenceDraft, ReferenceDrafts, load_record
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.reference_check import trouble
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.options import DrafterSpec

IDLE_TURNS = 10
logger = logging.getLogger("sglang.dflash_plugin")


def check(scheduler: Any, info: DrafterSpec) -> None:
    """Compare the server's drafts with the checkpoint's known answers.

    Raises:
        DFlashError: they differ and the option ``known_answers`` is "require".
    """
    worker = scheduler.draft_worker
    mode = info.options.known_answers
    if mode == "off":
        return
    record = load_record(info.checkpoint)
    if record is None:
        logger.info("%s has no known answers: the drafter is not checked", info.checkpoint)
        return
    if worker.block_size != info.config.block_size:
        logger.info(
            "blocks are cut to %d tokens of %d: the known answers do not apply",
            worker.block_size,
            info.config.block_size,
        )
        return
    found = _compare(scheduler, record, info)
    if found is None:
        logger.info("the drafter's %d known answers agree", len(record.answers))
        return
    args = scheduler.server_args
    quantized = argument(args, "quantization") or "fp8" in str(argument(args, "kv_cache_dtype"))
    if mode == "warn" or quantized:
        logger.warning("%s", found)
        return
    raise DFlashError(f"{found}. To serve all the same, set DFLASH_PLUGIN_KNOWN_ANSWERS=warn")


def _compare(scheduler: Any, record: ReferenceDrafts, info: DrafterSpec) -> str | None:
    """What is wrong, or None."""
    worker = scheduler.draft_worker
    limit = int(worker.target_worker.model_runner.model_config.context_len)
    compared = 0

    def drafts(expected: ReferenceDraft) -> list[int] | None:
        nonlocal compared
        if len(expected.prompt) + 1 + worker.block_size > limit:
            return None
        block = draft(scheduler, expected.prompt)
        # In half precision the target itself may continue a prompt otherwise.
        if block[0] != expected.anchor:
            return None
        compared += 1
        # One that drafts from its anchor has a last draft that SGLang's blocks have no place for.
        return [*block[1:], *expected.drafts[len(block) - 1 :]]

    dtype = str(worker.target_worker.model_runner.dtype)
    exact = dtype == "torch.float32" and info.options.draft_weights == "checkpoint"
    walked = info.config.selector is not None
    found = trouble(record, drafts, is_float32=exact, walked=walked)
    if found is None and not compared:
        return (
            "the target continues every known prompt otherwise than recorded: it is not the one "
            "that the drafter was made for"
        )
    return found


def draft(scheduler: Any, prompt: list[int]) -> list[int]:
    """The block [anchor, drafts] that the server verifies first after a prompt."""
    request = make_request(scheduler, prompt, max_new_tokens=2, temperature=0.0, ignore_eos=True)
    return run(scheduler, [request])[0]


def make_request(scheduler: Any, prompt: list[int], **params: Any) -> Any:
    """A request as the scheduler gets it from a client.

    Args:
        scheduler: SGLang's.
        prompt: token ids.
        params: of ``SamplingParams``.
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
    """Run requests through a scheduler that is not serving yet, and empty its cache again.

    Args:
        scheduler: SGLang's.
        requests: of ``make_request``.
        whole: verify whole blocks, whatever the policy says.

    Returns:
        The blocks [anchor, drafts] that were verified for the batch's first request.

    Raises:
        DFlashError: the scheduler does not take them.
    """
    worker, streamer = scheduler.draft_worker, type(scheduler.output_streamer)
    blocks: list[list[int]] = []
    # The overlapping loop makes it when it starts.
    scheduler.result_queue = deque()
    native = streamer.stream_output
    streamer.stream_output = lambda *_, **__: None
    widths = worker.widths
    held = widths is not None and widths.held
    if widths is not None:
        widths.held = held or whole
    try:
        for request in requests:
            scheduler._add_request_to_queue(request)
        idle = 0
        while not all(request.finished() for request in requests):
            batch = _next_batch(scheduler)
            # A turn may only take finished requests out.
            idle = idle + 1 if batch is None else 0
            if batch is None and idle < IDLE_TURNS:
                continue
            if batch is None:
                raise DFlashError(
                    f"the scheduler does not run a prompt of {len(requests[0].origin_input_ids)} "
                    "tokens at start: give the KV cache more memory, or set "
                    "DFLASH_PLUGIN_KNOWN_ANSWERS=off"
                )
            is_prefill = batch.forward_mode.is_extend()
            result = scheduler.run_batch(batch)
            if not is_prefill:
                blocks.append(worker._draft_block_tokens_buf[0].tolist())
            scheduler.process_batch_result(batch.copy(), result)
        while _next_batch(scheduler) is not None:
            pass
    finally:
        streamer.stream_output = native
        if widths is not None:
            widths.held = held
    scheduler.flush_cache()
    return blocks


def _next_batch(scheduler: Any) -> Any:
    """What to run next, or None; the turn of SGLang's own loops."""
    plan = scheduler.get_next_batch_to_run(
        running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
    )
    scheduler.running_batch, scheduler.last_batch = plan.running_batch, plan.batch_to_run
    return plan.batch_to_run
