"""Verify passes over draft trees: the target's own text, whatever the tree."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch

from dflash_plugin.decoding.draft_tree import DraftTree, ancestors
from dflash_plugin.decoding.sampling import SamplingParams
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.static_kv import KVShape, StaticKV
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine, Request
from dflash_plugin.transformers.trees import TreePass
from tests.helpers.families import knowing_drafter
from tests.helpers.tiny import DFLASH2, VOCABULARY, tiny_drafter, tiny_target
from tests.transformers.test_engine import FEW, TARGETS, check_sampled_pairs, greedy, prompts_of

# Windows, soft-caps, sinks, learned positions, and values narrower than keys.
KINDS = ("llama", "gemma3_text", "gemma2", "gpt_oss", "gpt2", "deepseek_v3")


def doubting_drafter(texts: list[list[int]]) -> Drafter:
    """A drafter whose second choice is the text's token at every third position, else the first."""
    drafter = knowing_drafter(texts, lambda position: position % 3 == 0)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        first = hidden[..., 0].long()
        one_hot = torch.nn.functional.one_hot
        second = one_hot((first - 1) % VOCABULARY, VOCABULARY)
        return 12.0 * one_hot(first, VOCABULARY) + 10.0 * second

    drafter.logits = logits
    return drafter


def requests_of(prompts: list[list[int]], new_tokens: int = 24, **sampling: Any) -> list[Request]:
    """One for each prompt, with seeds where they sample."""
    return [
        Request(prompt, new_tokens, [], SamplingParams(**sampling, seed=seed if sampling else None))
        for seed, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_targets(kind):
    target, prompts = tiny_target(kind, **TARGETS[kind]), prompts_of(6)
    expected = [greedy(target, prompt, 24) for prompt in prompts]
    drafter = doubting_drafter([p + e for p, e in zip(prompts, expected, strict=True)])
    passes = []
    for rows, batch in ((0, 1), (8, 2), (16, 4), (16, 1)):
        engine = Engine(target, drafter, max_batch=batch, max_length=72, tree_rows=rows)
        found = engine.generate(requests_of(prompts))
        assert [result.tokens for result in found] == expected
        passes.append(sum(len(result.committed) for result in found))
        for result in found:
            assert 1 + sum(result.committed) == len(result.tokens)
            assert [len(path) for path in result.accepted_rows] == (result.accepted if rows else [])
            beside = sum(row > engine.num_drafts for path in result.accepted_rows for row in path)
            assert bool(beside) == bool(rows)
    assert max(passes[1:]) < passes[0]


@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_a_row_sees_the_text_and_its_path(window):
    """Brute force over a tree whose rows stand in slots other than their positions."""
    # Row 4 follows the anchor, row 5 row 4, row 6 row 1.
    parents = torch.tensor([[0, 0, 1, 2, 0, 4, 1]] * 2)
    depths = torch.tensor([[0, 1, 2, 3, 1, 2, 2]] * 2)
    tree = DraftTree(torch.zeros_like(parents), parents, depths, ancestors(parents, 3))
    kv = StaticKV([KVShape(1, 2, 2)], 2, 30, torch.float32, torch.device("cpu"))
    lengths = torch.tensor([2, 9])
    found = TreePass(kv, tree, lengths, 20).mask(window)
    for request, length in enumerate(lengths.tolist()):
        for row in range(7):
            path, at = {0, row}, row
            while at:
                at = int(parents[request, at])
                path.add(at)
            seen = {slot: slot for slot in range(length)}
            seen |= {length + one: length + int(depths[request, one]) for one in path}
            here = length + int(depths[request, row])
            expected = {slot for slot, at in seen.items() if window is None or here - at < window}
            assert set(found[request, row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("rows", [8, 16])
def test_dflash2_trees_leave_the_text_alone(rows):
    target, prompts = tiny_target("qwen3"), prompts_of(6)
    engine = Engine(target, tiny_drafter(**DFLASH2), max_batch=4, max_length=72, tree_rows=rows)
    found = engine.generate(requests_of(prompts))
    assert [r.tokens for r in found] == [greedy(target, prompt, 24) for prompt in prompts]
    assert any(path and path[0] > engine.num_drafts for r in found for path in r.accepted_rows)


def test_greedy_and_sampled_requests_share_trees():
    target, prompts = tiny_target(), prompts_of(4)
    engine = Engine(target, tiny_drafter(), max_batch=4, max_length=72, tree_rows=8)
    requests = requests_of(prompts[:2]) + requests_of(prompts[2:], temperature=0.8)
    found = engine.generate(requests)
    assert [r.tokens for r in found[:2]] == [greedy(target, prompt, 24) for prompt in prompts[:2]]
    single = Engine(target, tiny_drafter(), max_length=72, tree_rows=8)
    for result, request in zip(found, requests, strict=True):
        assert single.generate([request])[0].tokens == result.tokens


@pytest.mark.parametrize(
    ("changes", "options", "limits"),
    [
        pytest.param({}, {}, {}, id="drawn"),
        pytest.param({}, {"draft_sampling": "greedy"}, {}, id="likeliest"),
        pytest.param(DFLASH2, {}, {"top_k": 5, "top_p": 0.9}, id="dflash2-limited"),
    ],
)
def test_sampled_pairs_follow_the_target(changes, options, limits):
    target = tiny_target(**FEW)
    drafter = tiny_drafter(**FEW, target_hidden_size=16, **changes)
    engine = Engine(target, drafter, max_batch=2048, max_length=8, tree_rows=6, **options)
    check_sampled_pairs(target, engine, 12_000, **limits)


def test_passes_over_trees_tell_how_drafts_are_best_drawn():
    target, prompts = tiny_target(), prompts_of(4)
    engine = Engine(target, tiny_drafter(), max_batch=4, max_length=72, tree_rows=8)
    sampled = SamplingParams(temperature=0.8)
    engine.generate([Request(prompt, 24, [], sampled) for prompt in prompts])
    assert float(engine.acceptance.rows.max()) > 0


def test_rows_that_see_more_than_their_path_write_another_text(monkeypatch):
    """The comparison of texts sees a wrong mask."""
    target, prompts = tiny_target(), prompts_of(6)
    expected = [greedy(target, prompt, 24) for prompt in prompts]
    drafter = doubting_drafter([p + e for p, e in zip(prompts, expected, strict=True)])

    def causal(kv, tree, *others):
        return TreePass(kv, tree._replace(mask=torch.ones_like(tree.mask).tril()), *others)

    monkeypatch.setattr("dflash_plugin.transformers.engine.TreePass", causal)
    engine = Engine(target, drafter, max_length=72, tree_rows=8)
    assert [r.tokens for r in engine.generate(requests_of(prompts))] != expected


def test_the_drafter_sees_every_position_once():
    target, prompt = tiny_target(), prompts_of(1)[0]
    text = greedy(target, prompt, 30)
    drafter = doubting_drafter([prompt + text])
    injected: list[int] = []
    inject = drafter.inject

    def recording(features, positions):
        injected.extend(positions[positions >= 0].tolist())
        return inject(features, positions)

    drafter.inject = recording
    engine = Engine(target, drafter, max_length=80, tree_rows=8)
    assert engine.generate(requests_of([prompt], 30))[0].tokens == text
    assert injected == list(range(len(injected)))
    assert len(injected) >= len(prompt) + len(text) - 5


def test_injected_features_are_those_of_the_accepted_path():
    """Those of one whole pass over the text."""
    target, prompt = tiny_target(), prompts_of(1)[0]
    text = greedy(target, prompt, 20)
    drafter = doubting_drafter([prompt + text])
    seen: dict[int, torch.Tensor] = {}
    inject = drafter.inject

    def recording(features, positions):
        for row, position in zip(features[0], positions[0].tolist(), strict=True):
            if position >= 0:
                seen[position] = row.clone()
        return inject(features, positions)

    drafter.inject = recording
    Engine(target, drafter, max_length=80, tree_rows=8).generate(requests_of([prompt], 20))
    with torch.inference_mode():
        out = target(torch.tensor([prompt + text]), output_hidden_states=True, use_cache=False)
    layers = [out.hidden_states[layer + 1][0] for layer in drafter.config.target_layer_ids]
    whole = torch.cat(layers, dim=-1)
    positions = sorted(seen)
    found = torch.stack([seen[position] for position in positions])
    torch.testing.assert_close(found, whole[positions], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("turns", [None, (12, 4, 1, 20, 2), (36, 12)])
def test_the_adaptive_policy_may_choose_trees(turns):
    target, prompts = tiny_target(), prompts_of(6)
    expected = [greedy(target, prompt, 40) for prompt in prompts]
    drafter = doubting_drafter([p + e for p, e in zip(prompts, expected, strict=True)])
    engine = Engine(target, drafter, max_batch=2, max_length=88, adaptive=True)
    assert engine.policy is not None
    assert engine.policy.verify_lens == (1, 2, 4, 12, 20, 36)
    if turns is not None:
        rows, choose = cycle(turns), engine.policy.choose
        engine.policy.choose = lambda *args: choose(*args) and next(rows)
    found = engine.generate(requests_of(prompts, 40))
    assert [r.tokens for r in found] == expected
    # One of three tokens is a sibling of the chain's.
    expects = engine.policy.expected()
    assert len(expects) == 36
    assert expects[3] + 0.5 < expects[11] <= expects[35]


@pytest.mark.parametrize(("batch", "sizes"), [(1, (8, 16, 32)), (8, (8, 16)), (32, ())])
def test_trees_are_tried_at_few_requests(batch, sizes):
    options = {"max_batch": batch, "max_length": 40, "adaptive": True}
    assert Engine(tiny_target(), tiny_drafter(), **options).tree_sizes == sizes
    assert Engine(tiny_target(), tiny_drafter(), **options, tree_rows=32).tree_sizes == (32,)


def test_the_default_is_the_chain():
    target, prompts = tiny_target(), prompts_of(2)
    engine = Engine(target, tiny_drafter(), max_length=72)
    assert engine.tree_sizes == ()
    assert engine.generate(requests_of(prompts))[0].accepted_rows == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree_rows": -1}, "tree_rows is -1: give 'auto', or a number of rows, 0 for none"),
        ({"tree_rows": True}, "tree_rows is True: give"),
        ({"tree_rows": "8"}, "tree_rows is '8': give"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(DFlashError, match=message):
        Engine(tiny_target(), tiny_drafter(), max_length=72, **options)


def test_rows_without_a_drafter_are_told():
    with pytest.raises(DFlashError, match="tree_rows is 8 but there is no drafter"):
        Engine(tiny_target(), None, max_length=72, tree_rows=8)


def test_recurrent_targets_run_chains_alone():
    target = tiny_target("qwen3_5_text", **TARGETS["qwen3_5_text"])
    with pytest.raises(DFlashError, match="tree_rows is 8 but the target 'qwen3_5_text' has recur"):
        Engine(target, tiny_drafter(), max_length=72, tree_rows=8)
    assert Engine(target, tiny_drafter(), max_length=72, adaptive=True).tree_sizes == ()
