"""The start-up check's loop, with a stand-in for SGLang's scheduler."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang.selfcheck import serve


class Streamer:
    """Sends tokens to clients."""

    def stream_output(self, *_: Any) -> None:
        raise AssertionError("no client asked")


class Batch:
    """One request that decodes."""

    forward_mode = SimpleNamespace(is_extend=lambda: False)

    def copy(self) -> Batch:
        return self


class Scheduler:
    """Ends a request after so many passes; gives no batch where there are none."""

    def __init__(self, passes: int) -> None:
        self.passes, self.modes = passes, []
        self.output_streamer = Streamer()
        self.running_batch = self.last_batch = None

    def _add_request_to_queue(self, request: Any) -> None:
        request.finished = lambda: 0 < self.passes == len(self.modes)

    def get_next_batch_to_run(self, **_: Any) -> Any:
        batch = Batch() if len(self.modes) < self.passes else None
        return SimpleNamespace(running_batch=None, batch_to_run=batch)

    def run_batch(self, batch: Batch) -> Any:
        self.modes.append(torch.is_inference_mode_enabled())

    def process_batch_result(self, batch: Batch, result: Any) -> None:
        self.output_streamer.stream_output()


@pytest.fixture(autouse=True)
def mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's mode, which its event loops enter."""
    module = ModuleType("sglang.srt.utils.common")
    module.DynamicGradMode = torch.inference_mode
    monkeypatch.setitem(sys.modules, module.__name__, module)


def request_of(length: int) -> Any:
    return SimpleNamespace(origin_input_ids=[5] * length)


def test_passes_run_in_the_mode_in_which_the_scheduler_serves():
    scheduler, decoded = Scheduler(3), []
    serve(scheduler, [request_of(2)], lambda: decoded.append(len(scheduler.modes)))
    assert scheduler.modes == [True, True, True]
    assert decoded == [1, 2, 3]
    assert not torch.is_inference_mode_enabled()
    with pytest.raises(AssertionError, match="no client"):
        scheduler.output_streamer.stream_output()


def test_a_prompt_that_is_not_run_is_told():
    with pytest.raises(DFlashError, match="does not run a prompt of 7 tokens at start"):
        serve(Scheduler(0), [request_of(7)], lambda: None)
    assert Streamer.stream_output.__name__ == "stream_output"
