"""Adapters of the target beside drafts: each row of logits gets its own request's.

vLLM's V2 runner names one adapter a request for the head, as if each had one row of logits. Rows of
drafts would then get another request's adapter where adapters change the head, and a CPU fails.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

from dflash_plugin.vllm.options import drafts_for
from dflash_plugin.vllm.protocols import Method

# Attribute of ours on vLLM's record of the requests' adapters.
ROWS = "dflash_logit_rows"


def note_logit_rows(native: Method) -> Method:
    """``GPUModelRunner.prepare_inputs`` that notes how many rows of logits each request has."""

    @wraps(native)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = native(self, *args, **kwargs)
        if self.lora_config is not None and drafts_for(self):
            vars(self.lora_state)[ROWS] = np.diff(batch.cu_num_logits_np)
        return batch

    return prepare_inputs


def repeat_for_rows(native: Method) -> Method:
    """``LoraState.make_lora_inputs`` that names a request's adapter for each of its rows."""

    @wraps(native)
    def make_lora_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        of_requests, of_tokens, active = native(self, *args, **kwargs)
        rows = vars(self).get(ROWS)
        if rows is not None:
            of_requests = tuple(np.repeat(of_requests, rows))
        return of_requests, of_tokens, active

    return make_lora_inputs
