"""Adapters of the target beside drafts: which adapter each row of logits gets."""

from types import SimpleNamespace

import numpy as np
import pytest

from dflash_plugin.vllm import lora, options


class OfRequests:
    """Names adapters as vLLM's record does."""

    def make_lora_inputs(self, ids, tokens):
        return tuple(ids), tuple(np.repeat(ids, tokens)), {*ids}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("has_adapters", [True, False])
def test_each_row_of_logits_gets_its_requests_adapter(monkeypatch, ours, has_adapters):
    """Three, one and two rows; without this project's drafter or adapters all stays vLLM's."""

    monkeypatch.setattr(options, "drafter_spec", lambda config: config)
    batch = SimpleNamespace(cu_num_logits_np=np.array([0, 3, 4, 6]))
    prepare = lora.note_logit_rows(lambda self, output: batch)
    make = lora.repeat_for_rows(OfRequests.make_lora_inputs)
    runner = SimpleNamespace(
        lora_config=object() if has_adapters else None,
        lora_state=OfRequests(),
        vllm_config=SimpleNamespace(speculative_config=object() if ours else None),
    )
    assert prepare(runner, None) is batch
    rows, tokens, active = make(runner.lora_state, [7, 0, 8], [3, 9, 2])
    assert rows == ((7, 7, 7, 0, 8, 8) if ours and has_adapters else (7, 0, 8))
    assert (len(tokens), active) == (14, {7, 0, 8})
