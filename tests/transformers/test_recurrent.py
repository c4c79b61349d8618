"""Targets with recurrent layers: states after rejected drafts, in batches that accept raggedly."""

import copy

import pytest
import torch

from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine, Request
from dflash_plugin.transformers.static_cache import TargetPass
from dflash_plugin.transformers.target import Target
from tests.helpers.families import (
    FAMILIES,
    HYBRIDS,
    Family,
    knowing_drafter,
    own_texts,
    prompts,
    target_of,
)
from tests.helpers.tiny import SIZES, tiny_drafter, tiny_target
from tests.transformers.test_engine import FEW, check_sampled_pairs

NEW_TOKENS = 30
DELTA_RULE = next(family for family in FAMILIES if family.kind == "qwen3_5_text")


def by_kind(kind: str) -> Family:
    return next(family for family in FAMILIES if family.kind == kind)


@pytest.mark.parametrize("adaptive", [False, True], ids=["whole", "adaptive"])
@pytest.mark.parametrize("kind", ["qwen3_5_moe", "falcon_h1"])
def test_requests_that_accept_different_numbers_of_drafts_keep_their_text(kind, adaptive):
    target = target_of(by_kind(kind))
    texts = own_texts(target, NEW_TOKENS)
    whole = [prompt + text for prompt, text in zip(prompts(), texts, strict=True)]
    drafter = knowing_drafter(whole, lambda position: position % 7 == 0 or position % 5 == 0)
    for batch in (1, 4):
        engine = Engine(target, drafter, max_batch=batch, max_length=64, adaptive=adaptive)
        results = engine.generate(
            # Requests leave at different passes, so rows move.
            [Request(p, NEW_TOKENS - 7 * i, stop_ids=()) for i, p in enumerate(prompts())]
        )
        for result, text in zip(results, texts, strict=True):
            assert result.tokens == text[: len(result.tokens)]
        assert {count for result in results for count in result.accepted} == {0, 1, 2, 3}


def test_a_hybrid_prompt_is_read_in_chunks(monkeypatch):
    from dflash_plugin.transformers import engine as module

    monkeypatch.setattr(module, "PREFILL_TOKENS", 8)
    target = target_of(DELTA_RULE)
    engine = Engine(target, None, max_batch=4, max_length=64)
    results = engine.generate([Request(p, 8, stop_ids=()) for p in prompts()])
    assert [result.tokens for result in results] == own_texts(target, 8)


@torch.inference_mode()
def test_features_are_those_of_the_accepted_tokens():
    target, prompt = target_of(DELTA_RULE), prompts()[2]
    text = own_texts(target, NEW_TOKENS)[2]
    drafter = knowing_drafter([prompt + text], lambda position: position % 4 == 0)
    seen: dict[int, torch.Tensor] = {}
    inject = drafter.inject

    def recording(features, positions):
        for row, position in zip(features[0], positions[0].tolist(), strict=True):
            if position >= 0:
                assert position not in seen
                seen[position] = row.clone()
        inject(features, positions)

    drafter.inject = recording
    Engine(target, drafter, max_length=64).generate([Request(prompt, NEW_TOKENS, stop_ids=())])
    hidden = target(
        torch.tensor([prompt + text]), use_cache=False, output_hidden_states=True
    ).hidden_states
    layers = drafter.config.target_layer_ids
    expected = torch.cat([hidden[layer + 1] for layer in layers], dim=-1)[0]
    assert list(seen) == list(range(len(seen)))
    assert len(seen) > len(prompt) + NEW_TOKENS - 5
    found = torch.stack([seen[position] for position in range(len(seen))])
    torch.testing.assert_close(found, expected[: len(seen)], atol=1e-4, rtol=1e-4)


def test_sampled_text_of_a_hybrid_follows_the_target():
    """With convolutions, whose passes are quick; which layers are recurrent is all one here."""
    target = tiny_target("lfm2", **{**by_kind("lfm2").changes, **FEW})
    drafter = tiny_drafter(**FEW, target_hidden_size=16)
    check_sampled_pairs(target, Engine(target, drafter, max_batch=2048, max_length=8), 15_000)


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
@torch.inference_mode()
def test_states_after_a_pass_are_those_of_the_committed_tokens(family):
    """Each row commits another number of tokens; the last none."""
    target = Target(target_of(family), 4, 16)
    assert target.recurrent is not None
    tokens = torch.randint(4, 90, (4, 8), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(8).expand(4, 8)

    def run(start: int, end: int, counts: list[int]) -> None:
        step = TargetPass(target.kv, positions[:, start:end], 16, is_start=start == 0)
        target.forward(tokens[:, start:end], step)
        target.advance(counts)

    run(0, 4, [4] * 4)
    run(4, 8, [1, 4, 2, 0])
    found = copy.deepcopy(target.recurrent.buffers)
    for row, count in enumerate([1, 4, 2, 0]):
        run(0, 4 + count, [4 + count] * 4)
        for layer, states in target.recurrent.buffers.items():
            for key, state in states.items():
                difference = (found[layer][key][row] - state[row]).norm()
                # Of tokens more or less it would be about 1; deep layers amplify rounding.
                assert difference <= 0.03 * state[row].norm()


@pytest.mark.parametrize("kind", ["jamba", "mamba", "rwkv", "recurrent_gemma"])
def test_targets_that_cannot_take_tokens_back_are_refused(kind):
    with pytest.raises(DFlashError, match=rf"'{kind}'.*(state|engine's passes)"):
        Engine(target_of(by_kind(kind)), None)


def test_without_a_recurrent_layer_a_pass_needs_no_end():
    target = Target(tiny_target("llama", **SIZES), 1, 16)
    assert target.recurrent is None
    target.advance([1])
