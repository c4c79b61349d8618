"""What the worker does in CUDA graphs, where there is none to capture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors
from dflash_plugin.serving.draft_tokens import Candidates, block_noise
from dflash_plugin.sglang.draft_step import DraftGraphHead, Drafting, Step
from dflash_plugin.sglang.worker import Worker
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target


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


class Selecting:
    """A model with a selector."""

    def __init__(self) -> None:
        self.drafter = tiny_drafter(tiny_target(), **DFLASH2).requires_grad_(False)

    def candidates(self, hidden: torch.Tensor) -> Candidates:
        best = self.drafter.logits(hidden).topk(self.drafter.config.selector.top_k)
        gates = self.drafter.candidate_selector.hidden_projection(hidden)
        return Candidates(best.indices, best.values, gates)


def test_drafts_of_a_captured_pass_are_walked_through_its_candidates():
    """Chosen in the graph; drawn behind it, for those of its requests that are there."""
    model = Selecting()
    worker = Worker.__new__(Worker)
    worker._draft_worker = SimpleNamespace()
    worker.draft_model, worker.device, worker.step = model, "cpu", None
    worker.estimate = None
    worker.block_size, worker.vocab_size = 4, 97
    options = SimpleNamespace(draft_sampling="probabilistic")
    worker.info = SimpleNamespace(config=model.drafter.config, options=options)
    torch.manual_seed(0)
    head = DraftGraphHead(worker, 3)
    hidden, ids = torch.randn(3, 4, 32), torch.randint(97, (3, 4))
    head(hidden.flatten(0, 1), ids.flatten())
    rows, anchors, places = hidden[:, 1:], ids[:, 0], torch.tensor([9, 20, 30])
    chosen = model.drafter.propose(rows, anchors, places)
    assert head.out.view(-1, 3)[:3].tolist() == chosen.tokens.tolist()
    params = [SamplingParams(3.0, seed=5), SamplingParams()]
    sampling = SamplingTensors.build(params, torch.device("cpu"))
    unlimited = SimpleNamespace(
        need_top_k_sampling=False, need_top_p_sampling=False, need_min_p_sampling=False
    )
    batch = SimpleNamespace(reqs=[None, None], sampling_info=unlimited)
    worker.step = Step(batch, places[:2], sampling, torch.tensor([True, False]))
    best = model.drafter.logits(rows[:2]).topk(5)
    u = block_noise(sampling.seed, places[:2], 3)
    drawn = model.drafter.candidate_selector(
        best.indices, best.values, rows[:2], anchors[:2], sampling.temperature, u
    )
    assert head.out.view(2, 3).tolist() == drawn.tokens.tolist()
    assert drawn.tokens[0].tolist() != chosen.tokens[0].tolist()
    probs = worker.step.draft_probs
    assert probs is not None
    torch.testing.assert_close(probs, drawn.probs)
    assert worker.step.draft_candidates.tolist() == drawn.candidates.tolist()


@pytest.mark.parametrize("changes", [{}, DFLASH2], ids=["DFlash", "DFlash 2"])
def test_drafts_are_drawn_by_the_factors_of_the_estimate(worker, changes):
    """As the core draws them; what is learnt from are the drafter's own distributions."""
    drafter = tiny_drafter(tiny_target(), **changes).requires_grad_(False)
    model = SimpleNamespace(drafter=drafter, logits=drafter.logits)
    factors, places = torch.tensor([[0.5, 0.75, 1.0], [1.0, 0.5, 0.5]]), torch.tensor([9, 20])
    worker.draft_model, worker.block_size, worker.vocab_size = model, 4, 97
    worker.verifier = None
    worker.estimate = SimpleNamespace(
        factors=lambda *_: factors, learnt_from=lambda _: torch.tensor([1])
    )
    params = [SamplingParams(3.0, seed=5), SamplingParams(2.0, seed=6)]
    sampling = SamplingTensors.build(params, torch.device("cpu"))
    unlimited = SimpleNamespace(
        need_top_k_sampling=False, need_top_p_sampling=False, need_min_p_sampling=False
    )
    batch = SimpleNamespace(reqs=[None, None], sampling_info=unlimited)
    step = Step(batch, places, sampling, torch.tensor([False, False]))
    torch.manual_seed(0)
    rows, anchors = torch.randn(2, 3, 32), torch.randint(97, (2,))
    found = None
    if changes:
        found = Selecting.candidates(SimpleNamespace(drafter=drafter), rows.flatten(0, 1))
    tokens = worker.draw_drafts(Drafting(rows.flatten(0, 1), anchors, found), step)
    expected = drafter.propose(rows, anchors, places, sampling, factors)
    assert tokens.view(2, 3).tolist() == expected.tokens.tolist()
    torch.testing.assert_close(step.draft_probs, expected.probs)
    torch.testing.assert_close(step.lesson.draft_probs, expected.own_probs[1:])
    assert not torch.equal(expected.probs[1], expected.own_probs[1])
