"""Verify passes of fewer rows than a block, with a made-up SGLang around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.budget.width import WidthPolicy
from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang import compat, width
from dflash_plugin.sglang.width import Widths, route_inputs, skipping, widths_of

BLOCK, BATCH = 4, 3
CPU = torch.device("cpu")


class Graphs:
    """SGLang's runner of captured passes."""

    capture_bs = (4, 1, 2)

    def __init__(
        self, runner: Any, *, attn_backend: Any = None, speculative_num_draft_tokens: int = BLOCK
    ) -> None:
        self.made = runner, attn_backend, speculative_num_draft_tokens


class Runner:
    """SGLang's of the target."""

    def __init__(self) -> None:
        self.init_new_workspace = False
        self.attn_backend: Any = "whole"
        self.decode_cuda_graph_runner: Any = Graphs(self)
        self.backends = 0

    def _get_attention_backend(self, init_new_workspace: bool = False) -> Any:
        self.init_new_workspace = init_new_workspace
        self.backends += 1
        return SimpleNamespace(number=self.backends)


def worker_of(widths: Widths) -> SimpleNamespace:
    return SimpleNamespace(
        widths=widths,
        step="a step",
        target_worker=SimpleNamespace(model_runner=Runner()),
        _draft_block_tokens_buf=torch.zeros(8, BLOCK, dtype=torch.int64, device=CPU),
    )


def batch_of(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"reqs": [None] * BATCH, "return_logprob": False, **changes})


def widths_choosing(rows: int) -> Widths:
    widths = Widths(WidthPolicy((1, 2, BLOCK)), BLOCK)
    widths.policy.choose = lambda requests, now: rows
    return widths


def test_every_width_has_a_back_end_and_graphs_of_its_own():
    widths, runner = Widths(WidthPolicy((1, 2, BLOCK)), BLOCK), Runner()
    widths.capture(runner, Runner(), CPU)
    assert set(widths.passes) == {1, 2}
    for rows, (backend, graphs) in widths.passes.items():
        assert graphs.made == (runner, backend, rows)
    assert runner.backends == 2
    assert widths.policy.sizes == (1, 2, 4)
    assert not runner.init_new_workspace


def test_captured_passes_are_profiled(monkeypatch):
    """A verify pass takes 1 ms a row, a draft pass half a millisecond a request."""
    drafting = Runner()

    def seconds(graphs, device):
        if graphs is drafting.decode_cuda_graph_runner:
            return {1: 0.0005, 2: 0.001}
        return {size: 0.001 * size * graphs.made[2] for size in (1, 2, 4)}

    monkeypatch.setattr(width, "graph_seconds", seconds)
    widths = Widths(WidthPolicy((1, 2, BLOCK)), BLOCK)
    widths.capture(Runner(), drafting, CPU)
    assert widths.policy.prior == pytest.approx(
        {
            (1, 1): 0.001, (2, 1): 0.002, (4, 1): 0.004,
            (1, 2): 0.0025, (2, 2): 0.005,
            (1, BLOCK): 0.0045, (2, BLOCK): 0.009,
        }
    )  # fmt: skip
    monkeypatch.undo()
    assert width.graph_seconds(drafting.decode_cuda_graph_runner, CPU) == {}
    assert width.graph_seconds(None, CPU) == {}


def test_nothing_is_captured_where_graphs_are_off():
    widths, runner = Widths(WidthPolicy((1, BLOCK)), BLOCK), Runner()
    runner.decode_cuda_graph_runner = None
    widths.capture(runner, Runner(), CPU)
    assert not widths.passes
    assert runner.backends == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_is_cut_once_it_has_drafted_and_whole_again_afterwards(fails):
    widths = widths_choosing(2)
    worker = worker_of(widths)
    runner, whole = worker.target_worker.model_runner, worker._draft_block_tokens_buf
    widths.capture(runner, Runner(), CPU)
    before = runner.attn_backend, runner.decode_cuda_graph_runner
    drafts = torch.arange(20, device=CPU)
    rows = torch.arange(BATCH * BLOCK, device=CPU)
    try:
        with widths.verifying(worker, batch_of()):
            assert (runner.attn_backend, runner.decode_cuda_graph_runner) == widths.passes[2]
            assert torch.equal(widths.cut(rows), rows)
            assert not widths.skips_draft
            assert widths.narrow(worker, drafts, BATCH).tolist() == [0, 3, 6]
            assert worker._draft_block_tokens_buf.shape == (8, 2)
            assert widths.cut(rows).tolist() == [0, 1, 4, 5, 8, 9]
            assert widths.cut(rows).is_contiguous()
            with widths.whole():
                assert widths.rows == BLOCK
            assert widths.rows == 2
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert (runner.attn_backend, runner.decode_cuda_graph_runner) == before
    assert worker._draft_block_tokens_buf is whole
    assert widths.rows == BLOCK


def test_a_pass_of_anchors_alone():
    widths = widths_choosing(1)
    worker = worker_of(widths)
    with widths.verifying(worker, batch_of()):
        assert widths.narrow(worker, torch.arange(9, device=CPU), BATCH).tolist() == []
        cut = widths.cut(torch.arange(BATCH * BLOCK, device=CPU))
        assert cut.tolist() == [0, 4, 8]
        assert cut.is_contiguous()
    assert not widths.skips_draft


@pytest.mark.parametrize("reason", ["logprobs", "held"])
def test_passes_that_stay_whole(reason):
    widths = widths_choosing(1)
    worker = worker_of(widths)
    widths.held = reason == "held"
    drafts = torch.arange(9, device=CPU)
    with widths.verifying(worker, batch_of(return_logprob=reason == "logprobs")):
        assert not widths.skips_draft
        assert torch.equal(widths.narrow(worker, drafts, BATCH), drafts)
        assert not widths.narrowed


@pytest.mark.parametrize(("rows", "runs"), [(1, 0), (2, 1)])
def test_the_draft_pass_is_left_out_where_no_draft_is_verified(rows, runs):
    widths = widths_choosing(rows)
    worker, calls = worker_of(widths), []
    forward = skipping(lambda batch: calls.append(batch), worker)
    positions = torch.arange(BATCH * BLOCK, device=CPU)
    with widths.verifying(worker, batch_of()):
        out = forward(SimpleNamespace(positions=positions))
        assert len(calls) == runs
        assert runs or out.logits_output.hidden_states.shape == (BATCH * BLOCK, 1)
    # Passes that are no steps, such as those that warm up, run.
    worker.step = None
    forward(SimpleNamespace(positions=positions))
    assert len(calls) == runs + 1


def test_the_input_of_a_pass_is_cut():
    class DFlashVerifyInput:
        def __init__(self, positions: Any) -> None:
            self.positions = positions

        def prepare_for_verify(self, batch: Any, target_worker: Any) -> Any:
            return batch.out_cache_loc

    widths = widths_choosing(2)
    worker: Any = worker_of(widths)
    module = SimpleNamespace(DFlashVerifyInput=DFlashVerifyInput)
    running: list[Any] = [None]
    route_inputs(module, lambda: running[0])
    rows = torch.arange(BATCH * BLOCK, device=CPU)

    def made() -> tuple[list[int], list[int]]:
        found = module.DFlashVerifyInput(positions=rows)
        assert isinstance(found, DFlashVerifyInput)
        slots = found.prepare_for_verify(SimpleNamespace(out_cache_loc=rows), worker.target_worker)
        return found.positions.tolist(), slots.tolist()

    everything, cut = rows.tolist(), [0, 1, 4, 5, 8, 9]
    assert made() == (everything, everything)
    running[0] = worker
    with widths.verifying(worker, batch_of()):
        assert made() == (everything, everything)
        widths.narrow(worker, rows, BATCH)
        assert made() == (cut, cut)


def info_of(**options: Any) -> Any:
    values = {"adaptive_verification": True, "min_draft_tokens": 0, "max_draft_tokens": None}
    return SimpleNamespace(
        options=SimpleNamespace(**{**values, "latency_vs_throughput": 0.5, **options})
    )


def server_args(**changes: Any) -> SimpleNamespace:
    values = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "enable_two_batch_overlap": False}
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def old_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed", lambda: "0.5.17")


@pytest.mark.usefixtures("old_sglang")
def test_widths_follow_the_options():
    assert widths_of(info_of(adaptive_verification=False), server_args(), 16) is None
    found = widths_of(info_of(min_draft_tokens=2, max_draft_tokens=7), server_args(), 16)
    assert found is not None
    assert found.block == 16
    assert found.policy.widths == (3, 4, 6, 8)
    assert found.policy.weight == 0.5


@pytest.mark.usefixtures("old_sglang")
@pytest.mark.parametrize(("name", "value"), [("tp_size", 2), ("enable_two_batch_overlap", True)])
def test_servers_that_cannot_agree_on_a_width_are_refused(name, value):
    with pytest.raises(DFlashError, match=f"{name} is {value}: set it to .*, or turn"):
        widths_of(info_of(), server_args(**{name: value}), 16)
