"""What the worker does in CUDA graphs, where there is none to capture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.sglang.worker import Worker


class Drafter:
    """Takes what is injected."""

    def __init__(self) -> None:
        self.injected: list[tuple[Any, ...]] = []

    def inject(self, *arguments: Any) -> None:
        self.injected.append(arguments)


@pytest.fixture
def worker() -> Worker:
    made = Worker.__new__(Worker)
    made.draft_model = Drafter()
    made._draft_worker = SimpleNamespace()
    made.draft_model_runner = SimpleNamespace(token_to_kv_pool="pool")
    made.graph_injects, made.in_graph = True, False
    return made


def captured(hidden: torch.Tensor | None) -> tuple[Any, ...]:
    batch = SimpleNamespace(positions=torch.arange(9), out_cache_loc=torch.arange(9) + 100)
    return SimpleNamespace(hidden_states=hidden), batch, 8


def append(worker: Worker, committed: torch.Tensor | None) -> None:
    worker._append_target_hidden_to_draft_kv_by_loc(
        target_hidden=torch.zeros(8, 3),
        cache_loc=torch.arange(8),
        positions=torch.arange(8),
        commit_lens=committed,
    )


def test_a_captured_pass_injects_all_rows_of_its_graph(worker):
    worker.capture_injection(None, *captured(torch.ones(9, 3)))
    features, positions, slots, pool, committed = worker.draft_model.injected[0]
    assert features.shape == (8, 3)
    assert positions.tolist() == list(range(8))
    assert slots.tolist() == list(range(100, 108))
    assert (pool, committed) == ("pool", None)


@pytest.mark.parametrize(("in_graph", "times"), [(True, 0), (False, 1)])
def test_a_verify_pass_outside_of_graphs_injects_what_is_committed(worker, in_graph, times):
    worker.in_graph = in_graph
    committed = torch.tensor([3, 1], dtype=torch.int32)
    append(worker, committed)
    assert len(worker.draft_model.injected) == times
    assert all(arguments[-1] is committed for arguments in worker.draft_model.injected)


def test_a_prompt_is_injected_whatever_ran_it(worker):
    worker.in_graph = True
    append(worker, None)
    assert len(worker.draft_model.injected) == 1


def test_graphs_without_features_inject_nothing(worker):
    worker.capture_injection(None, *captured(torch.ones(9, 3)))
    worker.capture_injection(None, *captured(None))
    worker.in_graph = True
    append(worker, torch.tensor([3, 1], dtype=torch.int32))
    assert len(worker.draft_model.injected) == 2
