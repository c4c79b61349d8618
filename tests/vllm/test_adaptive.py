"""The number of drafts of a step in vLLM, with a made-up runner around it."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dflash_plugin.adaptive.step_times import Lengths
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.vllm.adaptive import AdaptiveManager
from dflash_plugin.vllm.step_profile import CONTEXT, CONTEXT_VARIABLE, REPEATS

CPU = torch.device("cpu")
DRAFTS, SLOTS, MOST = 7, 12, 1000


@pytest.fixture(autouse=True)
def sent(monkeypatch) -> list[Any]:
    """What was copied to the device."""
    copies: list[Any] = []

    def async_tensor_h2d(data: Any, device: torch.device) -> torch.Tensor:
        copies.append(data)
        return torch.from_numpy(np.array(data)).to(device)

    utilities = SimpleNamespace(async_tensor_h2d=async_tensor_h2d)
    monkeypatch.setitem(sys.modules, "vllm.utils.torch_utils", utilities)
    return copies


@pytest.fixture
def manager(sent) -> AdaptiveManager:
    """With captured passes of 16, 32 and 64 tokens."""
    return made()


class Native:
    """vLLM's own manager, as far as it is used."""

    _batch_budget = None
    added_by_vllm = "vLLM's"

    def batches_to_profile(self, sizes: list[int]) -> Any:
        return iter([{"num_tokens": sizes[0], "context_len": 8192}])

    def compact_batch(self, drafts: Any, scheduled: Any, starts: Any) -> Any:
        assert self._batch_budget is not None
        budget = self._batch_budget[2]
        if budget == drafts.sum():
            return scheduled, starts
        others = scheduled - drafts
        if budget == 0:
            return others, np.arange(len(starts), dtype=starts.dtype)
        verifying = int((drafts > 0).sum())
        spread = np.zeros_like(others)
        spread[:verifying] = budget // verifying
        spread[: budget % verifying] += 1
        return others + spread, starts


def made(**options: Any) -> AdaptiveManager:
    states = SimpleNamespace(num_speculative_steps=DRAFTS, max_num_reqs=SLOTS, device=CPU)
    starts = torch.full((SLOTS + 1,), -7, dtype=torch.int32)
    found = AdaptiveManager(Native(), Options(**options), states, starts, MOST, admits_on_host=True)
    batches = list(found.batches_to_profile([64, 16, 32]))
    assert batches == [{"num_tokens": 64, "context_len": CONTEXT}]
    found.set_initial_cost_curves([])
    return found


def step(manager: AdaptiveManager, counts: list[int], others: list[int]) -> dict[str, Any]:
    """One step as vLLM's runner takes it."""
    names = [f"{index}" for index in range(len(counts))]
    scheduled = {n: c + o for n, c, o in zip(names, counts, others, strict=True)}
    drafts = {n: [0] * c for n, c in zip(names, counts, strict=True) if c}
    total = manager.get_num_tokens(scheduled, drafts)
    of_drafts = np.array(counts, dtype=np.int32)
    logits = np.concatenate([[0], np.cumsum(of_drafts + 1)]).astype(np.int32)
    tokens = np.array(list(scheduled.values()), dtype=np.int32)
    tokens, logits = manager.compact_batch(of_drafts, tokens, logits)
    # The runner sends what the host knows, and the manager corrects it.
    manager.query_start_loc[: len(names) + 1] = torch.tensor([0, *np.cumsum(tokens)])
    manager.query_start_loc[len(names) + 1 :] = total
    slots = torch.arange(len(names))
    starts, queries, admitted, none = manager.reallocate_drafts(names, slots)
    assert none is None
    assert int(tokens.sum()) == total
    assert int(queries[len(names)]) == total == int(queries[-1])
    assert int(starts[len(names)]) == len(names) + admitted
    batch = SimpleNamespace(idx_mapping=slots, req_ids=names)
    manager.record_confidences(torch.zeros(0), batch)
    return {
        "total": total,
        "drafts": (starts[1:] - starts[:-1] - 1).tolist(),
        "tokens": (queries[1 : len(names) + 1] - queries[: len(names)]).tolist(),
    }


def choosing(manager: AdaptiveManager, monkeypatch: Any, rows: list[int]) -> None:
    turns = itertools.cycle(rows)
    monkeypatch.setattr(manager.policy, "choose", lambda *_: next(turns))


def test_what_only_vllms_manager_has_is_taken_from_there(manager):
    assert manager.added_by_vllm == "vLLM's"
    with pytest.raises(AttributeError, match="neither"):
        manager.neither  # noqa: B018


def test_whole_blocks_come_first(manager):
    assert step(manager, [7, 7, 7], [1, 1, 1]) == {
        "total": 24, "drafts": [7, 7, 7], "tokens": [8, 8, 8]
    }  # fmt: skip


def test_a_choice_holds_for_the_next_step(manager, monkeypatch):
    choosing(manager, monkeypatch, [1, 8, 8])
    counts, others = [7, 7], [1, 1]
    assert step(manager, counts, others)["total"] == 16
    assert manager.verify_len == 1  # What this step drafts would be verified by none.
    assert step(manager, counts, others) == {"total": 2, "drafts": [0, 0], "tokens": [1, 1]}
    assert step(manager, counts, others)["total"] == 16


def test_the_best_drafts_fill_a_captured_pass(manager, monkeypatch):
    choosing(manager, monkeypatch, [3])
    manager.acceptance_probs[:4] = torch.tensor([0.9, 0.1, 0.5, 0.8])[:, None]
    step(manager, [7] * 4, [1] * 4)
    found = step(manager, [7] * 4, [1] * 4)
    # Three rows each make 12 tokens, and the pass that holds them 16.
    assert found["total"] == 16
    # 0.9 to the powers 1 to 7, 0.5, and 0.8 to the powers 1 to 4.
    assert found["drafts"] == [7, 0, 1, 4]
    assert found["tokens"] == [8, 1, 2, 5]


def test_prompts_beside_are_no_step_to_learn_from(manager):
    for _ in range(20):
        manager.verify_len = 4
        found = step(manager, [7, 7, 0], [1, 1, 90])
        # Beyond the captured passes nothing is filled up.
        assert found["total"] == 92 + 2 * 3
        assert found["tokens"][2] == 90
    assert not manager.policy.times.seconds
    assert sum(manager.policy.steps.values()) == 20


def test_fewer_drafts_than_a_block_are_taken_as_they_are(manager):
    assert step(manager, [7, 3], [1, 1])["drafts"] == [7, 3]


def test_logits_have_a_limit(manager):
    manager.max_logits = 10
    assert sum(step(manager, [7, 7], [1, 1])["drafts"]) == 8


def test_limits_of_a_request():
    manager = made(min_draft_tokens=1, max_draft_tokens=3)
    assert manager.policy.verify_lens == (2, 4)
    manager.acceptance_probs[:2] = torch.tensor([0.99, 0.01])[:, None]
    assert manager.budget.drafts_to_verify(4, 2, 2) == 6
    manager.verify_len = 4
    names = ["a", "b"]
    manager.get_num_tokens(dict.fromkeys(names, 8), dict.fromkeys(names, [0] * 7))
    assert manager._draft_budget == 6


def test_profiled_passes_say_what_steps_take(manager):
    def sample(tokens, forward, requests, drafter, captured=True):
        return SimpleNamespace(
            num_target_tokens=tokens, forward_ms=forward, num_reqs=requests, drafter_ms=drafter,
            full_cudagraph=captured,
        )  # fmt: skip

    manager.set_initial_cost_curves(
        [
            sample(16, 2.0, 2, 1.0), sample(16, 9.0, 2, 1.0), sample(16, 2.0, 2, 1.0),
            sample(32, 3.0, 4, 1.5), sample(64, 5.0, 8, 2.0), sample(128, 50.0, 8, 90.0, False),
        ]
    )  # fmt: skip
    assert manager.policy.sizes == (2, 4, 8)
    prior = manager.policy.times.prior
    assert prior[8, 8, 8] == pytest.approx(7e-3)
    assert prior[8, 1, 8] == pytest.approx(2e-3)
    assert prior[4, 4, 8] == pytest.approx(2e-3 + 1.5e-3)
    assert prior[4, 6, 8] == pytest.approx(3e-3 + 1.5e-3)


def test_the_policy_is_told_what_the_drafts_promise(manager, monkeypatch):
    monkeypatch.setattr(manager.policy, "choose", lambda requests, now: 8)
    for chance, tokens in ((0.0, 1.0), (1.0, 8.0)):
        manager.acceptance_probs[:] = chance
        for _ in range(1600):
            step(manager, [7] * SLOTS, [1] * SLOTS)
            # As the policy asks, before it chooses.
            found = manager.policy.expected()
        assert max(found) == pytest.approx(tokens, abs=1e-3)


def test_the_estimator_learns_now_and_then(manager):
    learnt = 0
    for _ in range(40):
        learnt += manager.learns
        step(manager, [7] * 3, [1] * 3)
    assert learnt == 10


def test_batches_that_gain_nothing_are_verified_whole(manager, monkeypatch):
    """Passes of up to 4 requests take as long as one; the policy, which would cut, is not asked."""
    monkeypatch.setattr(manager.policy, "choose", lambda *_: 3)
    sizes = {1: 1.0, 2: 1.1, 4: 1.19, 8: 1.5}
    manager.set_initial_cost_curves(
        [
            SimpleNamespace(
                num_target_tokens=8 * requests, forward_ms=took, num_reqs=requests, drafter_ms=1.0,
                full_cudagraph=True,
            )
            for requests, took in sizes.items()
        ]
    )  # fmt: skip
    assert manager.bypass == 4
    for _ in range(3):
        assert step(manager, [7] * 4, [1] * 4)["total"] == 32
        assert not manager.learns
    assert manager.steps == 0
    # A larger batch is chosen for; its first step still verifies what was drafted before.
    assert step(manager, [7] * 5, [1] * 5)["total"] == 40
    assert step(manager, [7] * 5, [1] * 5)["total"] == 16
    # What the larger batch's choice would have cut is whole again.
    assert step(manager, [7] * 4, [1] * 4)["total"] == 32


def test_a_step_behind_one_that_did_not_draft_verifies_nothing(manager, monkeypatch):
    manager.bypass = 4
    manager.verify_len = 1
    assert step(manager, [7] * 4, [1] * 4)["total"] == 4
    assert step(manager, [7] * 4, [1] * 4)["total"] == 32


def test_small_batches_ask_and_send_nothing(manager, monkeypatch, sent):
    """From the second one in a row on, whatever stands beside the drafts."""
    drafting(manager, monkeypatch, [(3, 8)])
    manager.bypass = 4
    manager.native.compact_batch = None
    step(manager, [7] * 3, [1] * 3)
    manager.policy = manager.budget.policy = manager.selection = None
    sent.clear()
    assert step(manager, [7] * 3, [1] * 3)["drafts"] == [7, 7, 7]
    assert not sent
    assert step(manager, [7, 5, 0], [1, 1, 40])["tokens"] == [8, 6, 40]


def test_passes_of_as_many_requests_send_their_counts_once(manager, monkeypatch, sent):
    choosing(manager, monkeypatch, [3])
    manager.acceptance_probs[:] = torch.linspace(0.9, 0.1, SLOTS)[:, None]
    step(manager, [7] * 4, [1] * 4)
    found = [step(manager, [7] * 4, [1] * 4)["drafts"] for _ in range(2)]
    assert found[0] == found[1]
    assert len(sent) == 2, "where logits of whole blocks begin, and the counts"
    # Others are sent as they are: one request ends soon, and one reads its prompt.
    assert step(manager, [7, 1, 7, 0], [1, 1, 1, 5])["tokens"][3] == 5
    assert len(sent) == 3


def test_a_limit_holds_for_small_batches_too():
    manager = made(max_draft_tokens=3)
    manager._find_bypass([1, 2], {8: 1.0, 16: 1.0})
    assert manager.bypass == 0


def drafting(manager: AdaptiveManager, monkeypatch: Any, lengths: list[tuple[int, int]]) -> None:
    """Let steps choose these lengths in turn: rows to verify, rows of the blocks to draft."""
    assert manager.draft_short_blocks()
    choosing_blocks(manager, monkeypatch, lengths)
    slots = torch.arange(SLOTS)  # Whose prompts were read in the step before.
    read = SimpleNamespace(idx_mapping=slots, req_ids=[f"{slot}" for slot in range(SLOTS)])
    manager.record_confidences(torch.zeros(0), read)


def choosing_blocks(
    manager: AdaptiveManager, monkeypatch: Any, lengths: list[tuple[int, int]]
) -> None:
    turns = itertools.cycle(Lengths(*one) for one in lengths)

    def choose(*_: Any) -> int:
        manager.policy._chosen = next(turns)
        return manager.policy._chosen.verify

    monkeypatch.setattr(manager.policy, "choose", choose)


def test_no_more_is_verified_than_was_drafted(manager, monkeypatch):
    """Lengths that a step chooses: rows that the next one verifies, and rows that it drafts."""
    drafting(manager, monkeypatch, [(8, 4), (8, 8), (8, 8), (4, 4), (4, 4)])
    found = [step(manager, [7, 7], [1, 1])["drafts"] for _ in range(6)]
    # A pass of 16 tokens would hold all drafts, of which 8 were made in an earlier step.
    assert found == [[7, 7], [3, 3], [7, 7], [7, 7], [3, 3], [3, 3]]


def test_drafts_of_shorter_blocks_are_chosen_among_themselves(manager, monkeypatch):
    drafting(manager, monkeypatch, [(3, 4)])
    # Behind the drafts that were made stand better ones, of an earlier step.
    manager.acceptance_probs[:5] = torch.tensor([0.9, 0.1, 0.5, 0.8, 0.4])[:, None]
    manager.acceptance_probs[:5, 3:] = 1.0
    step(manager, [7] * 5, [1] * 5)
    # A pass of 16 tokens holds 11 drafts of 5 requests.
    assert step(manager, [7] * 5, [1] * 5)["drafts"] == [3, 0, 3, 3, 2]
    # Requests that end soon have fewer; none is counted that was not made.
    assert step(manager, [7, 7, 1, 2], [1] * 4)["drafts"] == [3, 3, 1, 2]
    assert step(manager, [2, 1, 7], [1, 1, 60])["drafts"] == [2, 1, 3]


def test_a_request_that_sat_out_has_the_drafts_of_a_shorter_block(manager, monkeypatch):
    """It may have been drafted when blocks were short; the others are cut like it, for a step."""
    drafting(manager, monkeypatch, [(8, 4), (8, 8), (8, 8)])
    step(manager, [7] * 3, [1] * 3)
    step(manager, [7] * 2, [1] * 2)
    assert manager.draft_len == 8
    assert step(manager, [7] * 3, [1] * 3)["drafts"] == [3, 3, 3]
    # A request whose prompt was read in the last step has drafts from there.
    choosing_blocks(manager, monkeypatch, [(8, 8)])
    step(manager, [7, 7, 0], [1, 1, 50])
    assert step(manager, [7] * 3, [1] * 3)["drafts"] == [7, 7, 7]


def test_small_batches_draft_whole_blocks(manager, monkeypatch):
    drafting(manager, monkeypatch, [(4, 4)])
    manager.bypass = 2
    step(manager, [7] * 3, [1] * 3)
    assert step(manager, [7] * 2, [1] * 2)["drafts"] == [3, 3]
    assert manager.draft_len == 8
    assert step(manager, [7] * 2, [1] * 2)["drafts"] == [7, 7]


def test_what_is_drafted_outside_of_serving_is_whole(manager, monkeypatch):
    drafting(manager, monkeypatch, [(4, 4)])
    step(manager, [7] * 2, [1] * 2)
    assert (manager.verify_len, manager.draft_len) == (4, 4)
    manager.draft_whole_blocks()
    assert (manager.verify_len, manager.draft_len) == (8, 8)


def test_shorter_blocks_need_limits_that_let_few_drafts_be_verified():
    assert not made(min_draft_tokens=4).draft_short_blocks()
    assert made(min_draft_tokens=3).draft_short_blocks()
    assert made(max_draft_tokens=3).draft_short_blocks()


def test_fewer_drafts_than_the_limit_make_a_smaller_pass(manager):
    manager = made(max_draft_tokens=3)
    assert step(manager, [7, 2], [1, 1])["drafts"] == [3, 2]


def test_shorter_blocks_are_expected_by_what_they_drafted(manager, monkeypatch):
    drafting(manager, monkeypatch, [(4, 4)])
    manager.acceptance_probs[:, :3], manager.acceptance_probs[:, 3:] = 1.0, 0.0
    step(manager, [7] * SLOTS, [1] * SLOTS)
    before = manager.policy.expected()
    for _ in range(1600):
        step(manager, [7] * SLOTS, [1] * SLOTS)
        found = manager.policy._expected_of_short()
    # Verify lengths 1 to 4; all drafts of 12 requests fit into the pass of 32 or 64 tokens.
    assert found == pytest.approx([1.0, 2.67, 4.0, 4.0], abs=0.01)
    # Whole blocks are taken to follow, as far as their first rows go.
    whole = manager.policy.expected()
    assert whole != before
    assert whole[:2] == pytest.approx(found[:2])
    assert all(tokens > found[3] for tokens in whole[2:])


def test_draft_passes_of_shorter_blocks_are_profiled(manager):
    """Three of the five steps of a number of requests run again, and draft shorter blocks."""
    sizes = [2, 4, 16, 32]
    manager.native.batches_to_profile = lambda captured: (
        {"num_tokens": size, "context_len": 8192} for size in [*sizes, 64] for _ in range(5)
    )
    assert manager.draft_short_blocks()
    samples, whole = [], []
    for batch in manager.batches_to_profile(sizes):
        tokens, is_short = batch["num_tokens"], manager.draft_len == 4
        assert is_short or manager.draft_len == 8
        whole.append(batch.get("uniform_decode", False))
        samples.append(
            SimpleNamespace(
                num_target_tokens=tokens, forward_ms=4.0, num_reqs=min(tokens, SLOTS),
                drafter_ms=1.0 if is_short else 3.0, full_cudagraph=tokens <= sizes[-1],
            )
        )  # fmt: skip
    assert manager.draft_len == 8
    # Passes of 16 and 32 tokens have as many requests: all that there may be.
    assert len(samples) == 5 * 5 + 3 * REPEATS + 1
    # The last one is a request that schedules a whole block.
    assert whole == [False] * (5 * 5 + 3 * REPEATS) + [True]
    manager.set_initial_cost_curves(samples)
    prior = manager.policy.times.prior
    assert manager.policy.sizes == (2, 4, SLOTS)
    assert prior[SLOTS, 2, 8] == pytest.approx(7e-3)
    assert prior[SLOTS, 2, 4] == pytest.approx(5e-3)
    # Where a sample is missing, nobody knows whose the others are.
    manager.policy.times.prior.clear()
    manager.set_initial_cost_curves(samples[1:])
    assert (SLOTS, 2, 8) in prior
    assert (SLOTS, 2, 4) not in prior


def test_the_users_context_of_the_profile_stays(monkeypatch, manager):
    monkeypatch.setenv(CONTEXT_VARIABLE, "4096")
    # vLLM reads the variable itself.
    assert list(manager.batches_to_profile([16])) == [{"num_tokens": 16, "context_len": 8192}]
