"""The start-up check: the drafter's known answers, drafted by the whole server.

The recorded prompts run through the scheduler as requests do: target pass, injection into the paged
cache, draft with the CUDA graphs that serve. No request has come by then.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from typing import Any

from dflash_plugin.errors import DFlashError
from dflash_plugin.known_answer import KnownAnswer, KnownAnswers, load_record
from dflash_plugin.serving.check import trouble
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.metrics import INTERNAL
from dflash_plugin.sglang.options import Hosted

logger = logging.getLogger("sglang.dflash_plugin")


def check(scheduler: Any, info: Hosted) -> None:
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
    found = _compare(scheduler, record)
    if found is None:
        logger.info("the drafter's %d known answers agree", len(record.answers))
        return
    args = scheduler.server_args
    quantised = argument(args, "quantization") or "fp8" in str(argument(args, "kv_cache_dtype"))
    if mode == "warn" or quantised:
        logger.warning("%s", found)
        return
    raise DFlashError(f"{found}. To serve all the same, set DFLASH_PLUGIN_KNOWN_ANSWERS=warn")


def _compare(scheduler: Any, record: KnownAnswers) -> str | None:
    """What is wrong, or None."""
    worker = scheduler.draft_worker
    limit = int(worker.target_worker.model_runner.model_config.context_len)
    compared = 0

    def drafts(expected: KnownAnswer) -> list[int] | None:
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
    found = trouble(record, drafts, is_float32=dtype == "torch.float32")
    if found is None and not compared:
        return (
            "the target continues every known prompt otherwise than recorded: it is not the one "
            "that the drafter was made for"
        )
    return found


def draft(scheduler: Any, prompt: list[int]) -> list[int]:
    """The block [anchor, drafts] that the server verifies first after a prompt."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    worker, streamer = scheduler.draft_worker, type(scheduler.output_streamer)
    params = SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True)
    params.normalize(scheduler.tokenizer)
    request = Req(
        rid=INTERNAL,
        origin_input_text="",
        origin_input_ids=array("q", prompt),
        sampling_params=params,
        vocab_size=worker.vocab_size,
    )
    request.tokenizer = scheduler.tokenizer
    block: list[int] = []
    # The overlapping loop makes it when it starts.
    scheduler.result_queue = deque()
    native = streamer.stream_output
    streamer.stream_output = lambda *_, **__: None
    try:
        scheduler._add_request_to_queue(request)
        while not request.finished():
            plan = scheduler.get_next_batch_to_run(
                running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
            )
            scheduler.running_batch = plan.running_batch
            batch = plan.batch_to_run
            if batch is None:
                raise DFlashError(
                    f"the scheduler does not run a prompt of {len(prompt)} tokens at start: give "
                    "the KV cache more memory, or set DFLASH_PLUGIN_KNOWN_ANSWERS=off"
                )
            result = scheduler.run_batch(batch)
            if not batch.forward_mode.is_extend() or batch.forward_mode.is_target_verify():
                block = worker._draft_block_tokens_buf[0].tolist()
            scheduler.process_batch_result(batch.copy(), result)
            scheduler.last_batch = batch
    finally:
        streamer.stream_output = native
    while scheduler.last_batch is not None:
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch, scheduler.last_batch = plan.running_batch, plan.batch_to_run
    scheduler.flush_cache()
    return block
