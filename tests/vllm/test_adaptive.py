"""The number of drafts of a step in vLLM, with a made-up runner around it."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.vllm.adaptive import Budget

CPU = torch.device("cpu")
DRAFTS, SLOTS, MOST = 7, 12, 1000


@pytest.fixture
def budget(monkeypatch) -> Budget:
    """With captured passes of 16, 32 and 64 tokens."""
    utilities = SimpleNamespace(
        async_tensor_h2d=lambda data, device: torch.from_numpy(np.array(data)).to(device)
    )
    monkeypatch.setitem(sys.modules, "vllm.utils.torch_utils", utilities)
    return made()


def made(**options: Any) -> Budget:
    states = SimpleNamespace(num_speculative_steps=DRAFTS, max_num_reqs=SLOTS, device=CPU)
    starts = torch.full((SLOTS + 1,), -7, dtype=torch.int32)
    native = SimpleNamespace(batches_to_profile=lambda sizes: iter([{"num_tokens": sizes[0]}]))
    found = Budget(native, Options(**options), states, starts, MOST, admits_on_host=True)
    assert list(found.batches_to_profile([64, 16, 32])) == [{"num_tokens": 64}]
    found.set_initial_cost_curves([])
    return found


def step(budget: Budget, counts: list[int], others: list[int]) -> dict[str, Any]:
    """One step as vLLM's runner takes it."""
    names = [f"{index}" for index in range(len(counts))]
    scheduled = {n: c + o for n, c, o in zip(names, counts, others, strict=True)}
    drafts = {n: [0] * c for n, c in zip(names, counts, strict=True) if c}
    total = budget.get_num_tokens(scheduled, drafts)
    of_drafts = np.array(counts, dtype=np.int32)
    logits = np.concatenate([[0], np.cumsum(of_drafts + 1)]).astype(np.int32)
    tokens = np.array(list(scheduled.values()), dtype=np.int32)
    tokens, logits = budget.compact_batch(of_drafts, tokens, logits)
    # The runner sends what the host knows, and the manager corrects it.
    budget.query_start_loc[: len(names) + 1] = torch.tensor([0, *np.cumsum(tokens)])
    budget.query_start_loc[len(names) + 1 :] = total
    slots = torch.arange(len(names))
    starts, queries, admitted, none = budget.reallocate_drafts(names, slots)
    assert none is None
    assert int(tokens.sum()) == total
    assert int(queries[len(names)]) == total == int(queries[-1])
    assert int(starts[len(names)]) == len(names) + admitted
    budget.record_confidences(torch.zeros(0), SimpleNamespace(idx_mapping=slots))
    return {
        "total": total,
        "drafts": (starts[1:] - starts[:-1] - 1).tolist(),
        "tokens": (queries[1 : len(names) + 1] - queries[: len(names)]).tolist(),
    }


def choosing(budget: Budget, monkeypatch: Any, rows: list[int]) -> None:
    turns = itertools.cycle(rows)
    monkeypatch.setattr(budget.policy, "choose", lambda *_: next(turns))


def test_whole_blocks_come_first(budget):
    assert step(budget, [7, 7, 7], [1, 1, 1]) == {
        "total": 24, "drafts": [7, 7, 7], "tokens": [8, 8, 8]
    }  # fmt: skip


def test_a_choice_holds_for_the_next_step(budget, monkeypatch):
    choosing(budget, monkeypatch, [1, 8, 8])
    counts, others = [7, 7], [1, 1]
    assert step(budget, counts, others)["total"] == 16
    assert budget.width == 1  # What this step drafts would be verified by none.
    assert step(budget, counts, others) == {"total": 2, "drafts": [0, 0], "tokens": [1, 1]}
    assert step(budget, counts, others)["total"] == 16


def test_the_best_drafts_fill_a_captured_pass(budget, monkeypatch):
    choosing(budget, monkeypatch, [3])
    budget.chances[:4] = torch.tensor([0.9, 0.1, 0.5, 0.8])[:, None]
    step(budget, [7] * 4, [1] * 4)
    found = step(budget, [7] * 4, [1] * 4)
    # Three rows each make 12 tokens, and the pass that holds them 16.
    assert found["total"] == 16
    # 0.9 to the powers 1 to 7, 0.5, and 0.8 to the powers 1 to 4.
    assert found["drafts"] == [7, 0, 1, 4]
    assert found["tokens"] == [8, 1, 2, 5]


def test_prompts_beside_are_no_step_to_learn_from(budget):
    for _ in range(20):
        budget.width = 4
        found = step(budget, [7, 7, 0], [1, 1, 90])
        # Beyond the captured passes nothing is filled up.
        assert found["total"] == 92 + 2 * 3
        assert found["tokens"][2] == 90
    assert not budget.policy.seconds
    assert sum(budget.policy.steps.values()) == 20


def test_fewer_drafts_than_a_block_are_taken_as_they_are(budget):
    assert step(budget, [7, 3], [1, 1])["drafts"] == [7, 3]


def test_logits_have_a_limit(budget):
    budget.most_logits = 10
    assert sum(step(budget, [7, 7], [1, 1])["drafts"]) == 8


def test_limits_of_a_request():
    budget = made(min_draft_tokens=1, max_draft_tokens=3)
    assert budget.policy.widths == (2, 4)
    budget.chances[:2] = torch.tensor([0.99, 0.01])[:, None]
    assert budget._budget_of(4, 2, 2) == 6
    budget.width = 4
    names = ["a", "b"]
    budget.get_num_tokens(dict.fromkeys(names, 8), dict.fromkeys(names, [0] * 7))
    assert budget._budget == 6


def test_profiled_passes_say_what_steps_take(budget):
    def sample(tokens, forward, requests, drafter, captured=True):
        return SimpleNamespace(
            num_target_tokens=tokens, forward_ms=forward, num_reqs=requests, drafter_ms=drafter,
            full_cudagraph=captured,
        )  # fmt: skip

    budget.set_initial_cost_curves(
        [
            sample(16, 2.0, 2, 1.0), sample(16, 9.0, 2, 1.0), sample(16, 2.0, 2, 1.0),
            sample(32, 3.0, 4, 1.5), sample(64, 5.0, 8, 2.0), sample(128, 50.0, 8, 90.0, False),
        ]
    )  # fmt: skip
    assert budget.policy.sizes == (2, 4, 8)
    prior = budget.policy.prior
    assert prior[8, 8] == pytest.approx(7e-3)
    assert prior[8, 1] == pytest.approx(2e-3)
    assert prior[4, 4] == pytest.approx(2e-3 + 1.5e-3)
    assert prior[4, 6] == pytest.approx(3e-3 + 1.5e-3)


def test_the_policy_is_told_what_the_drafts_promise(budget, monkeypatch):
    monkeypatch.setattr(budget.policy, "choose", lambda requests, now: 8)
    for chance, tokens in ((0.0, 1.0), (1.0, 8.0)):
        budget.chances[:] = chance
        for _ in range(1600):
            step(budget, [7] * SLOTS, [1] * SLOTS)
            # As the policy asks, before it chooses.
            found = budget.policy.expected()
        assert max(found) == pytest.approx(tokens, abs=1e-3)


def test_the_estimator_learns_now_and_then(budget):
    learnt = 0
    for _ in range(40):
        learnt += budget.learns
        step(budget, [7] * 3, [1] * 3)
    assert learnt == 10
