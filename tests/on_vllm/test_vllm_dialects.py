"""Drafters of every kind on vLLM's layers: their drafts equal the core's, and so does the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from vllm import SamplingParams

from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.drafter.config import LatentAttentionConfig
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.serving import draft_tokens
from dflash_plugin.transformers.loading import load_drafter
from dflash_plugin.vllm.selfcheck import draft
from tests.helpers.distribution import check_distribution, continuations
from tests.helpers.greedy import greedy_text
from tests.helpers.layouts import SERVED
from tests.helpers.quantised import LAYOUTS, quantise
from tests.helpers.tiny import (
    DFLASH2,
    GEMMA4,
    PADDED,
    latent,
    tiny_target,
    write_target,
    write_tiny,
)
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.on_vllm.vllm_helpers import ON_V2, on_worker, running

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40], [50, 51, 52, 53]]
WINDOW = {"sliding_window": 8}
# Heads that are stored as wide as ``ENGINE_SIZES`` has them, and values that are padded to it.
LATENT = LatentAttentionConfig(
    q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=20, qk_rope_head_dim=12, v_head_dim=24
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.9}
KINDS: dict[str, dict[str, Any]] = {
    "reduced vocabulary": {"draft_vocab_size": 24, "own_head": True},
    "own everything, interleaved": {
        "own_embedding": True,
        "own_mask_embedding": True,
        "own_head": True,
        "embedding_scale": 2.0,
        "rope": {"theta": 1e4, "interleaved": True},
    },
    "anchor drafts, layers unsorted": {
        "sample_from_anchor": True,
        "target_layer_ids": (2, -1, 0),
    },
    "yarn, partial, biases, gemma, scales": {
        "rope": {
            "type": "yarn",
            "parameters": {"factor": 4.0, "original_max_position_embeddings": 64},
            "partial_rotary_factor": 0.5,
        },
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "norm_style": "gemma",
        "attention_value_scale": 0.5,
        "logit_softcap": 5.0,
        "logit_scale": 0.5,
    },
    "sinks, causal": {"attention_sinks": True, "layers": ({"causal": True}, {"causal": True})},
    "windows": {"layers": (WINDOW, WINDOW)},
    "latent attention, yarn": {
        **latent(LATENT),
        "rope": {"type": "yarn", "parameters": YARN, "interleaved": True},
    },
}
UNLIKE = "mixed windows and causality"
# vLLM refuses layers of two kinds on the V1 runner.
ON_V2_ONLY: dict[str, dict[str, Any]] = {
    "mixed windows": {"layers": (WINDOW, {})},
    UNLIKE: {"layers": ({**WINDOW, "causal": True}, {})},
}


FP8: list[dict[str, Any]] = [
    {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    {"draft_vocab_size": 24, "own_head": True},
]


def check_drafts(engine: Any, target: PreTrainedModel, drafter: Drafter) -> None:
    """Drafts after every prompt equal the core's."""
    for prompt in PROMPTS:
        expected = answer(drafter, target, prompt)
        assert min(expected.margins) > 1e-3
        assert on_worker(engine, draft, [*prompt, expected.anchor]) == expected.drafts


def check_text(engine: Any, target: PreTrainedModel) -> None:
    """Greedy text equals the target's own."""
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
    )
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == greedy_text(target, prompt, 16)


QUANTISED = "W4A16 with zero points"
# Interpreted kernels take their time, so on a CPU the V2 runner has what its own code decides.
ANCHOR = "anchor drafts, layers unsorted"
TESTED = {
    **(
        {ANCHOR: KINDS[ANCHOR]}
        if ON_V2 and not torch.cuda.is_available()
        else {**KINDS, QUANTISED: {}}
    ),
    **(ON_V2_ONLY if ON_V2 else {}),
}


@pytest.mark.parametrize("kind", TESTED)
def test_drafts_and_text_equal_the_core(pair, tmp_path, kind):
    target, directory = pair
    changes = TESTED[kind]
    plain = write_tiny(tmp_path / "plain", **{**SIZES, "target_hidden_size": 64, **changes})
    checkpoint = plain
    if kind == QUANTISED:
        checkpoint = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
    drafter = load_drafter(plain, target)
    with running(directory, checkpoint, max_model_len=256) as engine:
        check_drafts(engine, target, drafter)
        check_text(engine, target)
        # Windows do not break the target's one group; layers that run unlike each other do.
        groups = on_worker(engine, cache_groups)
        assert groups > 1 if kind == UNLIKE else groups == 1


# Laguna's has both: parts of its own, and the last layer.
@pytest.mark.parametrize(
    "layout", ["Laguna"] if ON_V2 and not torch.cuda.is_available() else SERVED
)
def test_other_layouts_and_the_last_layer_draft_what_the_core_does(pair, tmp_path, layout):
    target, directory = pair
    checkpoint = SERVED[layout](tmp_path)
    drafter = load_drafter(checkpoint, target)
    with running(directory, checkpoint, max_model_len=256) as engine:
        check_drafts(engine, target, drafter)
        check_text(engine, target)


@pytest.mark.skipif(ON_V2 and not torch.cuda.is_available(), reason="too slow interpreted")
def test_a_gemma_targets_factor_counts(tmp_path):
    """vLLM's Gemma multiplies behind its embedding module, which gives rows as they are stored."""
    directory = write_target(tmp_path / "target")
    # With two kinds of layers, the V1 runner would split the drafter's over cache groups.
    target = tiny_target(**SIZES, **{**GEMMA4, "layer_types": ["full_attention"] * 4})
    target.save_pretrained(directory)
    checkpoint, stored = (
        write_tiny(tmp_path / str(scale), **SIZES, target_hidden_size=64, embedding_scale=scale)
        for scale in (None, 1.0)
    )
    drafter, without = load_drafter(checkpoint, target), load_drafter(stored, target)
    with running(directory, checkpoint, max_model_len=256) as engine:
        for prompt in PROMPTS:
            expected = answer(drafter, target, prompt)
            assert min(expected.margins) > 1e-3
            assert answer(without, target, prompt).drafts != expected.drafts
            assert on_worker(engine, draft, [*prompt, expected.anchor]) == expected.drafts
        check_text(engine, target)


@pytest.mark.skipif(ON_V2 and not torch.cuda.is_available(), reason="too slow interpreted")
def test_a_padded_drafter_drafts_tokens_of_the_target_alone(pair, tmp_path):
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **{**SIZES, "target_hidden_size": 64, **PADDED})
    drafter = load_drafter(checkpoint, target)
    settings = {"speculative": {"draft_sample_method": "probabilistic"}, "max_model_len": 256}
    with running(directory, checkpoint, **settings) as engine:
        check_drafts(engine, target, drafter)
        check_text(engine, target)
        params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True, n=4)
        prompt = {"prompt_token_ids": PROMPTS[0]}
        drawn = engine.generate([prompt], params, use_tqdm=False)[0].outputs
    assert [len(one.token_ids) for one in drawn] == [16] * 4
    assert max(max(one.token_ids) for one in drawn) < 97


def cache_groups(worker: Any) -> int:
    """How many groups of layers have a block table of their own."""
    return len(worker.model_runner.kv_cache_config.kv_cache_groups)


@pytest.mark.skipif(ON_V2 and not torch.cuda.is_available(), reason="too slow interpreted")
@pytest.mark.parametrize("changes", FP8, ids=["borrowed head", "own head"])
def test_fp8_weights_draft_what_the_core_does_with_them(pair, tmp_path, changes):
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **{**SIZES, "target_hidden_size": 64, **changes})
    drafter = load_drafter(checkpoint, target, weights="fp8")
    options = {"additional_config": {"dflash_plugin": {"draft_weights": "fp8"}}}
    with running(directory, checkpoint, max_model_len=256, **options) as engine:
        for prompt in PROMPTS:
            expected = answer(drafter, target, prompt)
            assert min(expected.margins) > 1e-3
            assert on_worker(engine, draft, [*prompt, expected.anchor]) == expected.drafts
        check_text(engine, target)
        if changes is FP8[0]:
            # The head is the target's, whose weights are loaded again.
            on_worker(engine, spoil_the_head)
            assert on_worker(engine, draft, [*prompt, expected.anchor]) != expected.drafts
            on_worker(engine, reload)
            assert on_worker(engine, draft, [*prompt, expected.anchor]) == expected.drafts


def spoil_the_head(worker: Any) -> None:
    """Let the copy of the target's head that drafts be wrong."""
    worker.get_draft_model().drafter.head().fp8_scales.zero_()


def reload(worker: Any) -> None:
    """Read the target's weights again, as after they were trained further."""
    worker.reload_weights()


@pytest.mark.skipif(not ON_V2, reason="the V1 runner makes logits")
def test_the_head_kernel_drafts_what_logits_do(pair, tmp_path, monkeypatch):
    """Where kernels run, no logits are made of a few rows; here the kernel is interpreted."""
    calls = []
    native = draft_tokens.draft_head

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return native(*args, **kwargs)

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(draft_tokens.kernels, "available", lambda device: True)
    monkeypatch.setattr(draft_tokens, "draft_head", counted)
    target, directory = pair
    changes = {**SIZES, "target_hidden_size": 64, **KINDS["reduced vocabulary"]}
    drafter = load_drafter(write_tiny(tmp_path, **changes), target)
    with running(directory, tmp_path, max_model_len=256) as engine:
        expected = answer(drafter, target, PROMPTS[0])
        drafts = on_worker(engine, draft, [*PROMPTS[0], expected.anchor])
        assert drafts == expected.drafts
        check_text(engine, target)
    assert calls


@pytest.mark.skipif(ON_V2 and torch.cuda.device_count() < 2, reason="two GPUs, or the V1 runner")
@pytest.mark.parametrize("changes", [{}, latent(LATENT)], ids=["plain", "latent attention"])
def test_two_shards_draft_what_one_does(pair, tmp_path, monkeypatch, changes):
    """Tensor parallel: heads, inner width and vocabulary are split over two processes.

    The best draft is found shard by shard, without gathering the logits.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    target, directory = pair
    sizes = {**SIZES, "target_hidden_size": 64, **changes}
    checkpoint = write_tiny(tmp_path, **sizes, draft_vocab_size=24, own_head=True)
    drafter = load_drafter(checkpoint, target)
    settings = {"speculative": {"use_local_argmax_reduction": True}, "max_model_len": 256}
    with running(directory, checkpoint, tensor_parallel_size=2, **settings) as engine:
        for prompt in PROMPTS:
            expected = answer(drafter, target, prompt)
            assert on_worker(engine, draft, [*prompt, expected.anchor]) == expected.drafts
        check_text(engine, target)


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_has_the_targets_distribution(tmp_path, method):
    """χ² at temperature 1 over the whole vocabulary; a drafter with no idea still loses nothing."""
    directory = write_target(tmp_path / "target")
    target = tiny_target(**SIZES)
    with torch.no_grad():
        target.lm_head.weight.mul_(3)  # as sure as a trained one, so that few samples tell much
    target.save_pretrained(directory)
    checkpoint = write_tiny(tmp_path / "drafter", **SIZES, target_hidden_size=64)
    length, samples = (2, 300) if ON_V2 else (3, 600)
    expected = continuations(target, PROMPTS[0], length, best=5, cut=False)
    params = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, n=samples)
    settings = {"speculative": {"draft_sample_method": method}, "max_model_len": 256}
    with running(directory, checkpoint, max_num_seqs=64, **settings) as engine:
        prompt = {"prompt_token_ids": PROMPTS[0]}
        completions = engine.generate([prompt], params, use_tqdm=False)[0].outputs
    assert len(completions) == samples
    assert 0 < check_distribution([tuple(c.token_ids) for c in completions], expected) < samples


@pytest.mark.skipif(ON_V2 and not torch.cuda.is_available(), reason="test_vllm_adaptive has it")
def test_a_dflash2_drafter_drafts_with_a_shorter_block(tmp_path):
    """What the core does with a block of that size, and χ² of what is drawn from its candidates.

    Once without limits and once within a request's own top-k.
    """
    directory = write_target(tmp_path / "target")
    target = tiny_target(**SIZES)
    target.save_pretrained(directory)
    whole, short = (
        write_tiny(
            tmp_path / str(size), **SIZES, target_hidden_size=64, block_size=size,
            logit_softcap=5.0, logit_scale=0.5, **DFLASH2,
        )
        for size in (6, 4)
    )  # fmt: skip
    drafter = load_drafter(short, target)
    length, samples = 2, 1500
    expected = continuations(target, PROMPTS[0], length, best=5, cut=False)
    within = continuations(target, PROMPTS[0], length, best=3, cut=True)
    params = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, n=samples)
    settings = {"draft_sample_method": "probabilistic", "num_speculative_tokens": 3}
    with running(
        directory, whole, max_num_seqs=64, max_model_len=256, speculative=settings
    ) as engine:
        for prompt in PROMPTS:
            wanted = answer(drafter, target, prompt)
            assert min(wanted.margins) > 1e-3
            assert on_worker(engine, draft, [*prompt, wanted.anchor]) == wanted.drafts
        check_text(engine, target)
        prompt = {"prompt_token_ids": PROMPTS[0]}
        completions = engine.generate([prompt], params, use_tqdm=False)[0].outputs
        assert on_worker(engine, drawn_from) > 3
        params = SamplingParams(temperature=1.0, top_k=3, max_tokens=4, ignore_eos=True, n=samples)
        limited = engine.generate([prompt], params, use_tqdm=False)[0].outputs
        assert on_worker(engine, drawn_from) == 3
    assert len(completions) == samples
    assert 0 < check_distribution([tuple(c.token_ids) for c in completions], expected) < samples
    limited = [tuple(c.token_ids[:length]) for c in limited]
    assert check_distribution(limited, within) == samples


def drawn_from(worker: Any) -> int:
    """The most tokens that one of the last drafts may have been."""
    runner = worker.model_runner
    if ON_V2:  # Slots of earlier requests keep theirs.
        return int(runner.speculator.draft_logits.isfinite().sum(-1)[0].max())
    return int((runner.drafter.take_last_draft_probs() > 0).sum(-1).max())
