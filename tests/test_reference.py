"""Draft tokens against ``DFlashDraftModel`` of PyPI dflash 0.1.0, in float32."""

from pathlib import Path

import pytest
import torch
from dflash import model as reference
from torch.nn import functional as F

from dflash_plugin.config import LayerAttention, RopeConfig
from dflash_plugin.drafter import Drafter
from dflash_plugin.fetch import resolve_drafter
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target
from dflash_plugin.transformers.store import StaticStore
from tiny import VOCABULARY, tiny_target, write_tiny

DATA = Path(__file__).parent / "data"
PROMPTS, STEPS = 20, 20
FULL, SLIDING = LayerAttention(), LayerAttention(sliding_window=6)
CAUSAL, CAUSAL_SLIDING = (
    LayerAttention(causal=True),
    LayerAttention(sliding_window=6, causal=True),
)


@torch.inference_mode()
def compare_drafts(
    drafter: Drafter, directory: Path, embedding, head, tokens: torch.Tensor, features, start: int
) -> tuple[int, int]:
    """Draft at ``STEPS`` places of one sequence with both; tokens that agree, and all."""
    theirs = reference.DFlashDraftModel.from_pretrained(directory, dtype=torch.float32).eval()
    cache = reference._make_cache(theirs.config)
    length, size = tokens.shape[1], drafter.config.block_size
    drafter.store = StaticStore(drafter, 1, length + size, torch.float32, torch.device("cpu"))
    injected = equal = total = 0
    for step in range(STEPS):
        context = features[:, injected:start]
        block = torch.full((1, size), drafter.config.mask_token_id)
        block[:, 0] = tokens[:, start]
        hidden = theirs(
            target_hidden=context,
            noise_embedding=F.embedding(block, embedding),
            position_ids=torch.arange(injected, start + size)[None],
            past_key_values=cache,
            use_cache=True,
        )[:, 1 - size :]
        reference._crop_to(cache, start)
        expected = theirs.compute_logits(hidden, head).argmax(-1)
        drafter.inject(context, torch.arange(injected, start)[None])
        found = drafter.logits(drafter.draft(tokens[:, start], torch.tensor([start])))
        equal += int((found.argmax(-1) == expected).sum())
        total += expected.numel()
        injected, start = start, start + 1 + step % 3
    return equal, total


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
    target = tiny_target()
    drafter = load_drafter(directory, target, torch.float32)
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings()
    generator = torch.Generator().manual_seed(1)
    equal = total = 0
    for _ in range(PROMPTS):
        tokens = torch.randint(4, VOCABULARY, (1, 80), generator=generator)
        with torch.inference_mode():
            states = target(tokens, output_hidden_states=True).hidden_states
        features = torch.cat([states[i + 1] for i in drafter.config.target_layer_ids], dim=-1)
        outcome = compare_drafts(drafter, directory, embedding, head, tokens, features, 12)
        equal, total = equal + outcome[0], total + outcome[1]
    assert total == PROMPTS * STEPS * 7
    assert equal == total


def test_the_trained_drafter_drafts_the_same_tokens(smollm2):
    directory = resolve_drafter(None, "smollm2")
    target, tokenizer = load_target(smollm2, torch.float32, "cpu")
    drafter = load_drafter(directory, target)
    prompts = [
        encode(tokenizer, prompt)[:200]
        for name in ("gsm8k_test", "mt_bench")
        for prompt in load_prompts(DATA / f"{name}.jsonl", PROMPTS // 2)
    ]
    longest = max(len(prompt) for prompt in prompts) + 48
    engine = Engine(target, drafter, max_batch=8, max_length=longest)
    results = engine.generate([Request(prompt, 48, stop_ids=[]) for prompt in prompts])
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings()
    equal = total = 0
    for prompt, result in zip(prompts, results, strict=True):
        tokens = torch.tensor([prompt + result.tokens])
        with torch.inference_mode():
            states = target(tokens, output_hidden_states=True, use_cache=False).hidden_states
        features = torch.cat([states[i + 1] for i in drafter.config.target_layer_ids], dim=-1)
        outcome = compare_drafts(drafter, directory, embedding, head, tokens, features, len(prompt))
        equal, total = equal + outcome[0], total + outcome[1]
    assert total == PROMPTS * STEPS * 7
    assert equal == total
