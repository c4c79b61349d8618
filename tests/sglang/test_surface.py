"""The table of SGLang symbols stops a server whose SGLang is another one, with made-up modules."""

from __future__ import annotations

import sys
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang import compat, surface
from dflash_plugin.sglang.patches import watch_target_passes
from dflash_plugin.sglang.seams.features import DRAFTING, GRAPHS, METRICS, TRITON


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed", lambda: "0.5.20")


def install(monkeypatch: pytest.MonkeyPatch, create_worker: Any) -> None:
    """Put a module with one hooked method in SGLang's place."""
    packages = "sglang", "sglang.srt", "sglang.srt.speculative"
    for name in (*packages, "sglang.srt.speculative.spec_info"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    algorithm = type("SpeculativeAlgorithm", (), {"create_worker": create_worker})
    sys.modules["sglang.srt.speculative.spec_info"].SpeculativeAlgorithm = algorithm


def hooked(native: Any) -> Any:
    @wraps(native)
    def around(*args: Any) -> Any:
        return native(*args)

    return around


def create_worker(self: Any, server_args: Any) -> None: ...


def with_more(self: Any, server_args: Any, device: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (create_worker, r"did not take the hooks on sglang.*\.SpeculativeAlgorithm\.create_worker"),
        (hooked(with_more), r"create_worker.*expected the parameters \(server_args\)"),
        (hooked(create_worker), None),
    ],
    ids=["not applied", "another signature", "as expected"],
)
def test_a_hook_is_applied_to_the_function_that_it_was_written_for(monkeypatch, function, message):
    install(monkeypatch, function)
    if message is None:
        surface.verify_hooks({DRAFTING})
        return
    with pytest.raises(DFlashError, match=message):
        surface.verify_hooks({DRAFTING})


def test_only_features_in_use_stop_a_server():
    """No SGLang is there."""
    surface.verify_hooks(set())
    with pytest.raises(DFlashError, match="did not take the hooks on"):
        surface.verify_hooks({METRICS})


def test_objects_are_checked_for_what_features_in_use_read():
    runner = type("ModelRunner", (), {"__module__": "sglang.srt.model_executor.model_runner"})()
    surface.verify_objects({TRITON}, runner)
    with pytest.raises(DFlashError, match=r"ModelRunner\.capture_tail_hooks"):
        surface.verify_objects({GRAPHS}, runner)
    runner.capture_tail_hooks, runner.decode_cuda_graph_runner = [], None
    runner.eager_runner = None
    surface.verify_objects({GRAPHS}, runner)


def test_names_tell_classes_apart_without_their_modules():
    class Base: ...

    class Derived(Base): ...

    assert surface.is_instance(Derived(), "Other", "Base")
    assert not surface.is_instance(None, "Base")


@pytest.mark.parametrize("cut", [False, True])
def test_the_output_of_a_cut_pass_is_taken_before_sglang_reads_it(cut):
    logits = torch.arange(3.0)[:, None]
    output = SimpleNamespace(next_token_logits=logits, hidden_states=None)
    target = SimpleNamespace(
        forward_batch_generation=lambda batch: SimpleNamespace(
            logits_output=output, can_run_cuda_graph=True
        )
    )
    rows = SimpleNamespace(indices=torch.tensor([0, 1, 2, 2]), kept=torch.tensor([[7, 8, 9, -1]]))
    running = SimpleNamespace(rows=rows, logits=None, hidden=None) if cut else None
    worker: Any = SimpleNamespace(
        target_worker=target,
        in_graph=False,
        verifier=SimpleNamespace(cut=running),
        _draft_block_tokens_buf=torch.tensor([[7, 8, 9, 5]]),
    )
    watch_target_passes(worker)
    assert target.forward_batch_generation("a batch").logits_output is output
    assert worker.in_graph
    assert len(output.next_token_logits) == (4 if cut else 3)
    assert worker._draft_block_tokens_buf.tolist() == [[7, 8, 9, -1 if cut else 5]]
    assert running is None or running.logits is logits
