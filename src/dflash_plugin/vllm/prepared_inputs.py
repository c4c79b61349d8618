"""What the plugin changes in the inputs that the V2 runner prepares for a pass."""

from __future__ import annotations

from functools import wraps
from typing import Any

from dflash_plugin.vllm.lora import note_logit_rows
from dflash_plugin.vllm.options import drafts_for
from dflash_plugin.vllm.protocols import Method


def prepare(native: Method) -> Method:
    """``GPUModelRunner.prepare_inputs`` with all that this adapter adds."""
    return promise_two_rows(note_logit_rows(native))


def promise_two_rows(native: Method) -> Method:
    """``GPUModelRunner.prepare_inputs`` that is right where a replayed pass has no drafts.

    FlashAttention 3 is given the schedule of a pass before its graph runs. Where no request has
    more than one row the schedule is laid out otherwise, unless heads have 65 to 128 values
    (``mha_fwd_get_scheduler_metadata`` in hopper/flash_api.cpp), but the graph reads the layout
    that it was captured with, of requests with more rows. A batch can promise longer requests than
    it has.
    """

    @wraps(native)
    def prepare_inputs(
        self: Any, scheduled: Any, requests: Any, graph: Any, *args: Any, **kwargs: Any
    ) -> Any:
        batch = native(self, scheduled, requests, graph, *args, **kwargs)
        if graph.cg_mode.name == "FULL" and drafts_for(self):
            mode = self.vllm_config.compilation_config.cudagraph_mode
            # One row alone has a graph of verify passes, or else one that was captured with it.
            if batch.num_tokens_after_padding > 1 or mode.separate_routine():
                rows = batch.max_query_len or int(batch.num_scheduled_tokens.max())
                batch.max_query_len = max(rows, 2)
        return batch

    return prepare_inputs
