"""Draft tokens against the draft models of PyPI dflash 0.1.0, in float32."""

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from dflash import model as reference
from torch.nn import functional as F

from dflash_plugin.checkpoints.hub import resolve_drafter
from dflash_plugin.drafter.config import LayerAttention, RopeConfig
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.static_store import StaticStore
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target
from tests.helpers.tiny import DFLASH2, VOCABULARY, tiny_target, write_tiny

DATA = Path(__file__).parents[1] / "data"
PROMPTS, STEPS = 20, 20
# Of the trained drafter, whose target costs most of the time: five of each set.
TRAINED = 10
FULL, SLIDING = LayerAttention(), LayerAttention(sliding_window=6)
CAUSAL, CAUSAL_SLIDING = (
    LayerAttention(causal=True),
    LayerAttention(sliding_window=6, causal=True),
)


def their_drafts(theirs, hidden: torch.Tensor, anchors: torch.Tensor, head) -> torch.Tensor:
    """The reference's greedy drafts [1, K]."""
    if isinstance(theirs, reference.DFlash2DraftModel):
        return theirs.propose(hidden, anchors, head, 0.0)[0]
    return theirs.compute_logits(hidden, head).argmax(-1)


def check_selector(theirs, hidden: torch.Tensor, anchors: torch.Tensor, head, found) -> None:
    """The same candidates, and the same distribution over them along the greedy path."""
    likeliest = mock.patch.object(reference, "_sample_probs", lambda probs: probs.argmax(-1))
    with likeliest:
        _, candidates, probs = theirs.propose(hidden, anchors, head, 1.0)
    order, own_order = candidates.argsort(-1), found.candidates.argsort(-1)
    assert torch.equal(candidates.gather(-1, order), found.candidates.gather(-1, own_order))
    own = torch.softmax(found.scores, -1).gather(-1, own_order)
    torch.testing.assert_close(own, probs.gather(-1, order), atol=1e-4, rtol=1e-3)


class Agreement(NamedTuple):
    """Drafts that equal the reference's, those that are not the likeliest of their row, and all."""

    equal: int
    moved: int
    total: int

    def __add__(self, other: Any) -> "Agreement":
        return Agreement(*(a + b for a, b in zip(self, other, strict=True)))


@torch.inference_mode()
def compare_drafts(
    drafter: Drafter, directory: Path, embedding, head, tokens: torch.Tensor, features, start: int
) -> Agreement:
    """Draft at ``STEPS`` places of one sequence with both."""
    kind = reference.DFlashDraftModel
    if drafter.config.selector is not None:
        kind = reference.DFlash2DraftModel
    theirs = kind.from_pretrained(directory, dtype=torch.float32).eval()
    scale = reference._draft_value(theirs.config, "input_embedding_scale", 1.0)
    cache = reference._make_cache(theirs.config)
    length, size = tokens.shape[1], drafter.config.block_size
    drafter.store = StaticStore(drafter, 1, length + size, torch.float32, torch.device("cpu"))
    injected, agreement = 0, Agreement(0, 0, 0)
    for step in range(STEPS):
        context = features[:, injected:start]
        block = torch.full((1, size), drafter.config.mask_token_id)
        block[:, 0] = tokens[:, start]
        hidden = theirs(
            target_hidden=context,
            noise_embedding=F.embedding(block, embedding) * scale,
            position_ids=torch.arange(injected, start + size)[None],
            past_key_values=cache,
            use_cache=True,
        )[:, 1 - size :]
        reference._crop_to(cache, start)
        expected = their_drafts(theirs, hidden, tokens[:, start], head)
        drafter.inject(context, torch.arange(injected, start)[None])
        anchor = tokens[:, start], torch.tensor([start])
        own = drafter.draft(*anchor)
        torch.testing.assert_close(own, hidden, atol=1e-3, rtol=1e-3)
        found = drafter.propose(own, *anchor)
        if drafter.config.selector is not None:
            check_selector(theirs, hidden, tokens[:, start], head, found)
        moved = found.tokens != drafter.logits(own).argmax(-1)
        agreement += (int((found.tokens == expected).sum()), int(moved.sum()), expected.numel())
        injected, start = start, start + 1 + step % 3
    return agreement


def compare_on_random_texts(directory: Path, prompts: int) -> Agreement:
    """Both on random texts of a tiny target."""
    target = tiny_target()
    drafter = load_drafter(directory, target, torch.float32)
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings()
    generator = torch.Generator().manual_seed(1)
    agreement = Agreement(0, 0, 0)
    for _ in range(prompts):
        tokens = torch.randint(4, VOCABULARY, (1, 80), generator=generator)
        with torch.inference_mode():
            states = target(tokens, output_hidden_states=True).hidden_states
        features = torch.cat([states[i + 1] for i in drafter.config.target_layer_ids], dim=-1)
        agreement += compare_drafts(drafter, directory, embedding, head, tokens, features, 12)
    return agreement


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param((FULL, FULL), id="full"),
        pytest.param((CAUSAL, CAUSAL), id="full-causal"),
        pytest.param((SLIDING, SLIDING), id="sliding-not-causal"),
        pytest.param((CAUSAL_SLIDING, CAUSAL_SLIDING), id="sliding-causal"),
        pytest.param((FULL, CAUSAL_SLIDING), id="mixed-by-type"),
        pytest.param((FULL, SLIDING), id="mixed-not-causal"),
        pytest.param((CAUSAL, CAUSAL_SLIDING), id="mixed-causal"),
    ],
)
@pytest.mark.parametrize(
    "rope",
    [
        pytest.param(RopeConfig(theta=1e4, max_position_embeddings=512), id="default"),
        pytest.param(
            RopeConfig(
                theta=1e4,
                type="yarn",
                parameters={"factor": 4.0, "original_max_position_embeddings": 128},
                max_position_embeddings=512,
            ),
            id="yarn",
        ),
    ],
)
def test_random_weights_draft_the_same_tokens(layers, rope, tmp_path):
    directory = write_tiny(tmp_path / "drafter", layers=layers, rope=rope, block_size=8)
    found = compare_on_random_texts(directory, PROMPTS)
    assert found == (found.total, 0, PROMPTS * STEPS * 7)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"convolution": {"kernel_size": 2, "group_size": 1}}, id="group-1"),
        pytest.param({"convolution": {"kernel_size": 2, "group_size": 32}}, id="group-32"),
        pytest.param({"convolution": {"kernel_size": 1, "group_size": 16}}, id="1-tap"),
        pytest.param({"convolution": {"kernel_size": 3, "group_size": 4}}, id="3-taps"),
        pytest.param({"convolution": {"kernel_size": 8, "group_size": 8}}, id="8-taps"),
        pytest.param({"selector": {"rank": 1, "top_k": 2}}, id="rank-1-of-2"),
        pytest.param({"selector": {"rank": 16, "top_k": 16}}, id="rank-16-of-16"),
        pytest.param({"selector": {"rank": 5, "top_k": VOCABULARY}}, id="of-all-tokens"),
        pytest.param({"logit_softcap": 3.0}, id="capped"),
        pytest.param(
            {"embedding_scale": 2.5, "logit_scale": 0.5, "logit_softcap": 2.0}, id="scaled"
        ),
        pytest.param({"layers": (CAUSAL, CAUSAL)}, id="full-causal"),
        pytest.param({"layers": (SLIDING, SLIDING)}, id="sliding-not-causal"),
        pytest.param({"layers": (FULL, CAUSAL_SLIDING)}, id="mixed-by-type"),
    ],
)
def test_a_random_dflash2_drafter_drafts_the_same_tokens(changes, tmp_path):
    directory = write_tiny(tmp_path / "drafter", block_size=8, **{**DFLASH2, **changes})
    found = compare_on_random_texts(directory, 5)
    assert found.equal == found.total == 5 * STEPS * 7
    # The selector decides.
    assert found.moved > found.total / 10


def test_the_trained_drafter_drafts_the_same_tokens(smollm2):
    directory = resolve_drafter(None, "smollm2")
    target, tokenizer = load_target(smollm2, torch.float32, "cpu")
    drafter = load_drafter(directory, target)
    prompts = [
        encode(tokenizer, prompt)[:200]
        for name in ("gsm8k_test", "mt_bench")
        for prompt in load_prompts(DATA / f"{name}.jsonl", TRAINED // 2)
    ]
    longest = max(len(prompt) for prompt in prompts) + 48
    engine = Engine(target, drafter, max_batch=8, max_length=longest)
    results = engine.generate([Request(prompt, 48, stop_ids=[]) for prompt in prompts])
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings()
    found = Agreement(0, 0, 0)
    for prompt, result in zip(prompts, results, strict=True):
        tokens = torch.tensor([prompt + result.tokens])
        with torch.inference_mode():
            states = target(tokens, output_hidden_states=True, use_cache=False).hidden_states
        features = torch.cat([states[i + 1] for i in drafter.config.target_layer_ids], dim=-1)
        found += compare_drafts(drafter, directory, embedding, head, tokens, features, len(prompt))
    assert found == (found.total, 0, TRAINED * STEPS * 7)
