"""Drafters of every kind on SGLang: their drafts equal the core's, and so does the text."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts, answer, save_record
from dflash_plugin.decoding.sampling import SamplingParams
from dflash_plugin.drafter.config import LatentAttentionConfig, SelectorConfig
from dflash_plugin.transformers import Engine, Request, load_drafter
from tests.helpers.distribution import check_distribution, continuations
from tests.helpers.greedy import greedy_text
from tests.helpers.layouts import SERVED
from tests.helpers.quantised import LAYOUTS, keep_fp8_rows, quantise
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
from tests.on_sglang.checks import check_core
from tests.on_sglang.sglang_server import serving, tokens

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40], [50, 51, 52, 53]]
WINDOW = {"sliding_window": 8}
# Heads that are stored as wide as ``ENGINE_SIZES`` has them, and values that are padded to it.
LATENT = LatentAttentionConfig(
    q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=20, qk_rope_head_dim=12, v_head_dim=24
)
LATENT_KIND = "DFlash 2 with latent attention, yarn, windows"
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.9}
KINDS: dict[str, dict[str, Any]] = {
    "reduced vocabulary": {"draft_vocab_size": 24, "own_head": True},
    "own everything, interleaved, mask outside the vocabulary": {
        "own_embedding": False,
        "own_mask_embedding": True,
        "mask_token_id": 97,
        "own_head": True,
        "embedding_scale": 2.0,
        "rope": {"theta": 1e4, "interleaved": True},
    },
    "own embedding": {"own_embedding": True, "own_head": True},
    "anchor drafts, layers unsorted": {"sample_from_anchor": True, "target_layer_ids": (2, 0)},
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
    "mixed windows and causality": {"layers": ({**WINDOW, "causal": True}, {})},
    "DFlash 2": {**DFLASH2, "logit_softcap": 5.0, "logit_scale": 0.5},
    LATENT_KIND: {
        **DFLASH2,
        **latent(LATENT),
        "rope": {"type": "yarn", "parameters": YARN, "interleaved": True},
        "layers": (WINDOW, {}),
    },
}

QUANTISED = "ModelOpt NVFP4"


FP8: list[dict[str, Any]] = [
    {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    {"draft_vocab_size": 24, "own_head": True},
    DFLASH2,
]


@pytest.mark.parametrize("kind", [*KINDS, QUANTISED])
def test_drafts_and_text_equal_the_core(pair, schedulers, tmp_path, kind):
    target, directory = pair
    changes = {**SIZES, "target_hidden_size": 64, **KINDS.get(kind, {})}
    plain = write_tiny(tmp_path / "plain", **changes)
    checkpoint = plain
    if kind == QUANTISED:
        checkpoint = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
    drafter = load_drafter(plain, target)
    made = schedulers.run(
        directory, checkpoint, PROMPTS, temperature=0.0, max_new_tokens=16, ignore_eos=True
    )
    for prompt, texts, blocks in zip(PROMPTS, made["texts"], made["blocks"], strict=True):
        assert texts == [greedy_text(target, prompt, 16)]
        expected = answer(drafter, target, prompt)
        assert min(expected.margins) > 1e-3
        drafts = expected.drafts[: drafter.config.block_size - 1]
        assert blocks[0] == [expected.anchor, *drafts]
        # The next block reads what was injected after the first was verified.
        right = [draft == token for draft, token in zip(drafts, texts[0][1:], strict=False)]
        committed = 1 + [*right, False].index(False)
        expected = answer(drafter, target, [*prompt, *texts[0][:committed]])
        assert min(expected.margins) > 1e-3
        drafts = expected.drafts[: drafter.config.block_size - 1]
        assert blocks[1] == [expected.anchor, *drafts]


@pytest.mark.parametrize("layout", SERVED)
def test_other_layouts_and_the_last_layer_draft_what_the_core_does(
    pair, schedulers, tmp_path, layout
):
    target, directory = pair
    checkpoint = SERVED[layout](tmp_path)
    drafter = load_drafter(checkpoint, target)
    made = schedulers.run(
        directory, checkpoint, PROMPTS, temperature=0.0, max_new_tokens=16, ignore_eos=True
    )
    check_core(made, PROMPTS, target, drafter, 16)


def test_a_gemma_targets_factor_counts(schedulers, tmp_path):
    """SGLang's embedding module multiplies, so that the drafter reads the table behind it."""
    directory = write_target(tmp_path / "target")
    target = tiny_target(**SIZES, **GEMMA4)
    target.save_pretrained(directory)
    checkpoint, stored = (
        write_tiny(tmp_path / str(scale), **SIZES, target_hidden_size=64, embedding_scale=scale)
        for scale in (None, 1.0)
    )
    made = [
        schedulers.run(
            directory, place, PROMPTS, temperature=0.0, max_new_tokens=16, ignore_eos=True,
            any_back_end=True, settings={"disable_hybrid_swa_memory": True},
        )
        for place in (checkpoint, stored)
    ]  # fmt: skip
    drafters = [load_drafter(place, target) for place in (checkpoint, stored)]
    for index, prompt in enumerate(PROMPTS):
        expected = [answer(drafter, target, prompt) for drafter in drafters]
        assert expected[0].drafts != expected[1].drafts
        for found, wanted in zip(made, expected, strict=True):
            assert found["texts"][index] == [greedy_text(target, prompt, 16)]
            assert min(wanted.margins) > 1e-3
            assert found["blocks"][index][0] == [wanted.anchor, *wanted.drafts]


@pytest.mark.parametrize("draft_sampling", ["greedy", "probabilistic"])
def test_a_padded_drafter_drafts_tokens_of_the_target_alone(
    pair, schedulers, tmp_path, draft_sampling
):
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **{**SIZES, "target_hidden_size": 64, **PADDED})
    drafter = load_drafter(checkpoint, target)
    run = functools.partial(
        schedulers.run, directory, checkpoint, PROMPTS, max_new_tokens=16, ignore_eos=True,
        environment={"DFLASH_PLUGIN_DRAFT_SAMPLING": draft_sampling},
    )  # fmt: skip
    made = run(temperature=0.0)
    check_core(made, PROMPTS, target, drafter, 16)
    for texts in run(temperature=1.0, copies=4)["texts"]:
        assert [len(text) for text in texts] == [16] * 4
        assert max(map(max, texts)) < 97


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ("checkpoint", "reduced vocabulary"),
        ("fp8", "reduced vocabulary"),
        ("fp8", "DFlash 2"),
        ("checkpoint", LATENT_KIND),
    ],
)
def test_kernels_draft_and_verify_what_the_core_does(pair, interpreted, tmp_path, weights, kind):
    """All that runs on a GPU: injection, block pass, head, and the attention of both models."""
    target, directory = pair
    kinds = {**KINDS["mixed windows and causality"], **KINDS[kind]}
    sizes = {**SIZES, "target_hidden_size": 64, "intermediate_size": 48}
    checkpoint = write_tiny(tmp_path, **{**sizes, **kinds})
    drafter = load_drafter(checkpoint, target, weights=weights)
    made = interpreted.run(
        directory, checkpoint, PROMPTS[:1], copies=2, temperature=0.0, max_new_tokens=6,
        ignore_eos=True, environment={"DFLASH_PLUGIN_DRAFT_WEIGHTS": weights},
    )  # fmt: skip
    assert made["texts"][0] == 2 * [greedy_text(target, PROMPTS[0], 6)]
    expected = answer(drafter, target, PROMPTS[0])
    assert min(expected.margins) > 1e-3
    assert made["blocks"][0][0] == [expected.anchor, *expected.drafts]
    passes = len(made["blocks"][0])
    counts = made["counts"]
    # Neither changes what the engine serves; a selector's head is not launched ahead.
    assert (counts.pop("ahead") > 0) == (kind == "reduced vocabulary")
    assert counts == {"blocks": 6 * passes, "blocks_natively": 0, "heads": passes}


def test_kernels_run_laguna_layers_as_the_core_does(pair, interpreted, tmp_path):
    """Gate, norms of taps, and context rows that all layers norm in one product."""
    target, directory = pair
    checkpoint = SERVED["Laguna"](tmp_path)
    made = interpreted.run(
        directory, checkpoint, PROMPTS[:1], temperature=0.0, max_new_tokens=6, ignore_eos=True
    )
    assert made["texts"][0] == [greedy_text(target, PROMPTS[0], 6)]
    expected = answer(load_drafter(checkpoint, target), target, PROMPTS[0])
    assert made["blocks"][0][0] == [expected.anchor, *expected.drafts]
    assert made["counts"]["heads"] == len(made["blocks"][0])


def test_a_shorter_block_is_the_cores(pair, schedulers, tmp_path):
    """Convolutions and path end where the block does that the server asks for."""
    target, directory = pair
    whole, short = (
        write_tiny(tmp_path / str(size), **SIZES, target_hidden_size=64, block_size=size, **DFLASH2)
        for size in (4, 3)
    )
    made = schedulers.run(
        directory, whole, PROMPTS, settings={"speculative_num_draft_tokens": 3},
        temperature=0.0, max_new_tokens=16, ignore_eos=True,
    )  # fmt: skip
    drafter = load_drafter(short, target)
    check_core(made, PROMPTS, target, drafter, 16)


@pytest.mark.parametrize(
    ("kind", "turns"),
    [
        ("reduced vocabulary", [4, 3, 1, 2]),
        ("anchor drafts, layers unsorted", [1, 1, 1, 4]),
        ("mixed windows and causality", [1]),
        ("DFlash 2", [4, 3, 1, 2]),
    ],
)
def test_passes_of_fewer_rows_write_and_draft_the_same(pair, schedulers, tmp_path, kind, turns):
    """Every pass's drafts are the first of the core's, also behind passes that did not draft."""
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **{**SIZES, "target_hidden_size": 64, **KINDS[kind]})
    drafter = load_drafter(checkpoint, target)
    made = schedulers.run(
        directory, checkpoint, PROMPTS[:1], copies=3, widths=turns, temperature=0.0,
        max_new_tokens=16, ignore_eos=True,
    )  # fmt: skip
    text = greedy_text(target, PROMPTS[0], 16)
    assert made["texts"] == [3 * [text]]
    at_place = functools.cache(lambda place: answer(drafter, target, PROMPTS[0] + text[:place]))
    checked, uneven = 0, False
    for width, anchors, blocks in made["cut"]:
        # All of what a step may verify is used, by whichever request.
        assert sum(map(len, blocks)) == len(blocks) * (width - 1)
        uneven |= len(set(map(len, blocks))) > 1
        for anchor, drafts in zip(anchors, blocks, strict=True):
            place = anchor - len(PROMPTS[0])
            if place < len(text) - 4:
                expected = at_place(place)
                assert min(expected.margins) > 1e-4
                assert drafts == expected.drafts[: len(drafts)]
                checked += 1
    assert checked >= 3
    assert uneven == bool({2, 3} & set(turns))
    assert {width for width, _, _ in made["cut"]} == set(turns)


@pytest.mark.parametrize("kind", ["anchor drafts, layers unsorted", "DFlash 2"])
def test_steps_that_verify_few_drafts_draft_a_shorter_block(pair, schedulers, tmp_path, kind):
    """Its drafts are the core's of a drafter with such a block, in turns with whole blocks."""
    target, directory = pair
    sizes = {**SIZES, "target_hidden_size": 64, **KINDS[kind]}
    checkpoints = {
        rows: write_tiny(tmp_path / str(rows), **{**sizes, "block_size": rows}) for rows in (8, 4)
    }
    drafters = {rows: load_drafter(path, target) for rows, path in checkpoints.items()}
    turns = [[3, 4], [8, 8], [4, 4], [2, 4], [4, 8]]
    made = schedulers.run(
        directory, checkpoints[8], PROMPTS[:1], copies=3, widths=turns, temperature=0.0,
        max_new_tokens=24, ignore_eos=True,
    )  # fmt: skip
    text = greedy_text(target, PROMPTS[0], 24)
    assert made["texts"] == [3 * [text]]

    @functools.cache
    def drafts_at(place: int, rows: int) -> Any:
        return answer(drafters[rows], target, PROMPTS[0] + text[:place])

    checked = dict.fromkeys(drafters, 0)
    for (_, rows), (_, anchors, blocks) in zip(itertools.cycle(turns), made["cut"], strict=False):
        for anchor, drafts in zip(anchors, blocks, strict=True):
            place = anchor - len(PROMPTS[0])
            if place < len(text) - 8 and min(drafts_at(place, rows).margins) > 1e-4:
                assert drafts == drafts_at(place, rows).drafts[: len(drafts)]
                checked[rows] += 1
    assert min(checked.values()) >= 3
    assert any(
        drafts_at(place, 4).drafts != drafts_at(place, 8).drafts[:3] for place in range(1, 16)
    )


def test_penalties_do_not_depend_on_what_is_verified(pair, schedulers, tmp_path):
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **SIZES, target_hidden_size=64)
    whole, cut = (
        schedulers.run(
            directory, checkpoint, PROMPTS[:1], copies=2, widths=widths, temperature=0.0,
            max_new_tokens=16, ignore_eos=True, frequency_penalty=0.7, repetition_penalty=1.2,
        )["texts"]
        for widths in (None, [2, 3, 1, 4])
    )  # fmt: skip
    assert whole == cut
    assert cut[0][0] != greedy_text(target, PROMPTS[0], 16)


@pytest.mark.parametrize("changes", [{}, DFLASH2], ids=["DFlash", "DFlash 2"])
def test_kernels_draw_what_the_core_does(pair, schedulers, interpreted, tmp_path, changes):
    """The same seeds give the same text, by the kernels and by torch, in parts of blocks."""
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **SIZES, target_hidden_size=64, **changes)
    texts = [
        running.run(
            directory, checkpoint, PROMPTS[:1], copies=2, temperature=1.3, max_new_tokens=6,
            ignore_eos=True, sampling_seed=11, widths=[3, 1, 4],
        )["texts"]
        for running in (schedulers, interpreted)
    ]  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0][0][0] != greedy_text(target, PROMPTS[0], 6)


@pytest.mark.parametrize(
    ("changes", "limits"),
    [({}, {}), ({**DFLASH2, "selector": SelectorConfig(rank=6, top_k=16)}, {"top_k": 60})],
    ids=["DFlash", "DFlash 2, limited"],
)
def test_a_seed_gives_the_text_of_the_transformers_engine(
    pair, schedulers, tmp_path, changes, limits
):
    """Drafts, decisions and tokens are drawn alike, so that as many drafts are accepted."""
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **SIZES, target_hidden_size=64, **changes)
    how = {"temperature": 4.0, **limits}
    made = schedulers.run(
        directory, checkpoint, PROMPTS, max_new_tokens=32, ignore_eos=True, sampling_seed=11, **how
    )
    engine = Engine(target, load_drafter(checkpoint, target), max_batch=1, max_length=64)
    sampling = SamplingParams(seed=11, **how)
    found = [engine.generate([Request(prompt, 32, (), sampling)])[0] for prompt in PROMPTS]
    assert sum(sum(result.accepted) for result in found) > 5
    assert made["texts"] == [[result.tokens] for result in found]


@pytest.mark.parametrize("changes", FP8, ids=["borrowed head", "own head", "DFlash 2"])
def test_fp8_weights_draft_what_the_core_does_with_them(pair, schedulers, tmp_path, changes):
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **{**SIZES, "target_hidden_size": 64, **changes})
    drafter = load_drafter(checkpoint, target, weights="fp8")
    made = schedulers.run(
        directory, checkpoint, PROMPTS, environment={"DFLASH_PLUGIN_DRAFT_WEIGHTS": "fp8"},
        temperature=0.0, max_new_tokens=16, ignore_eos=True,
    )  # fmt: skip
    check_core(made, PROMPTS, target, drafter, 16)


@pytest.mark.parametrize("kind", ["FP8 by tensor", "W4A16"])
def test_a_quantised_drafter_that_keeps_what_it_stores(pair, schedulers, tmp_path, kind):
    """FP8 rows as they are stored; what SGLang multiplies on a GPU alone is dequantised here."""
    target, directory = pair
    plain = write_tiny(tmp_path / "plain", **SIZES, target_hidden_size=64)
    checkpoint = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
    drafter = load_drafter(checkpoint, target)
    if kind == "FP8 by tensor":
        drafter = keep_fp8_rows(drafter, checkpoint)
    made = schedulers.run(
        directory, checkpoint, PROMPTS, environment={"DFLASH_PLUGIN_DRAFT_WEIGHTS": "checkpoint"},
        temperature=0.0, max_new_tokens=16, ignore_eos=True,
    )  # fmt: skip
    check_core(made, PROMPTS, target, drafter, 16)


@pytest.mark.parametrize(
    ("draft_sampling", "turns", "changes", "limits"),
    [
        ("greedy", None, {}, {}),
        ("auto", None, {}, {}),
        ("probabilistic", [3, 1, 4, 2], {}, {}),
        ("probabilistic", [3, 1, 4, 2], DFLASH2, {"top_k": 5}),
        ("auto", [[3, 4], [8, 8], [4, 4]], {"block_size": 8}, {}),
    ],
)
def test_sampled_text_has_the_targets_distribution(
    pair, schedulers, tmp_path, draft_sampling, turns, changes, limits
):
    """χ² at temperature 1; a drafter with no idea still loses nothing."""
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **{**SIZES, "target_hidden_size": 64, **changes})
    samples = 1500
    expected = continuations(target, PROMPTS[0], 3, best=5, cut=bool(limits))
    made = schedulers.run(
        directory,
        checkpoint,
        PROMPTS[:1],
        copies=samples,
        environment={"DFLASH_PLUGIN_DRAFT_SAMPLING": draft_sampling},
        widths=turns,
        temperature=1.0,
        **limits,
        max_new_tokens=3,
        ignore_eos=True,
    )
    texts = [tuple(text) for text in made["texts"][0]]
    assert len(texts) == samples
    known = check_distribution(texts, expected)
    assert known == samples if limits else 0 < known < samples


@pytest.fixture(scope="module")
def ranks(pair, schedulers) -> Any:
    """Runs three copies of a prompt on two ranks, and sees that both do the same."""

    def run(checkpoint: Path, **job: Any) -> dict[str, Any]:
        _, directory = pair
        made = schedulers.run(
            directory, checkpoint, PROMPTS[:1], settings={"tp_size": 2},
            environment={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}, ignore_eos=True,
            **{"copies": 3, **job},
        )  # fmt: skip
        (other,) = made["others"]
        for what in ("texts", "blocks", "cut"):
            assert made[what] == other[what]
        return made

    return run


def test_ranks_draft_what_one_does(pair, ranks, tmp_path):
    """All of the reduced vocabulary lies on one of them."""
    target, _ = pair
    kind = KINDS["reduced vocabulary"]
    checkpoint = write_tiny(tmp_path, **{**SIZES, "target_hidden_size": 64, **kind})
    made = ranks(checkpoint, temperature=0.0, max_new_tokens=16)
    assert made["texts"] == [3 * [greedy_text(target, PROMPTS[0], 16)]]
    expected = answer(load_drafter(checkpoint, target), target, PROMPTS[0])
    assert min(expected.margins) > 1e-3
    assert made["blocks"][0][0] == [expected.anchor, *expected.drafts]


def test_ranks_that_hold_the_whole_drafter(pair, ranks, tmp_path):
    """Its three heads do not divide by two ranks; its own head is shared out all the same."""
    target, _ = pair
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "attention_sinks": True}
    checkpoint = write_tiny(
        tmp_path, **{**SIZES, "target_hidden_size": 64, **heads, "own_head": True}
    )
    made = ranks(checkpoint, temperature=0.0, max_new_tokens=16)
    assert made["texts"] == [3 * [greedy_text(target, PROMPTS[0], 16)]]
    expected = answer(load_drafter(checkpoint, target), target, PROMPTS[0])
    assert min(expected.margins) > 1e-3
    assert made["blocks"][0][0] == [expected.anchor, *expected.drafts]


def test_ranks_draw_the_same(pair, ranks, tmp_path):
    target, _ = pair
    checkpoint = write_tiny(tmp_path, **SIZES, target_hidden_size=64)
    made = ranks(checkpoint, temperature=1.3, max_new_tokens=16, sampling_seed=11)
    (texts,) = made["texts"]
    assert texts == 3 * texts[:1]
    assert texts[0] != greedy_text(target, PROMPTS[0], 16)


def test_ranks_whose_clocks_differ_verify_the_same(pair, ranks, tmp_path):
    target, _ = pair
    checkpoint = write_tiny(tmp_path, **{**SIZES, "block_size": 8}, target_hidden_size=64)
    made = ranks(checkpoint, widths="chosen", temperature=0.0, max_new_tokens=100)
    assert made["texts"] == [3 * [greedy_text(target, PROMPTS[0], 100)]]
    (other,) = made["others"]
    assert made["learnt"]["steps"] == other["learnt"]["steps"]
    assert made["learnt"]["short_block_steps"] == other["learnt"]["short_block_steps"] > 0
    assert made["learnt"]["step_milliseconds"] != other["learnt"]["step_milliseconds"]
    assert len({width for width, _, _ in made["cut"]}) > 2


def test_ranks_whose_clocks_differ_let_the_same_prompts_wait(pair, ranks, tmp_path):
    target, _ = pair
    checkpoint = write_tiny(tmp_path, **{**SIZES, "block_size": 8}, target_hidden_size=64)
    made = ranks(checkpoint, widths="chosen", copies=30, late=1, temperature=0.0, max_new_tokens=40)
    assert made["texts"] == [30 * [greedy_text(target, PROMPTS[0], 40)]]
    (other,) = made["others"]
    assert made["learnt"]["prompt_wait_steps"] == other["learnt"]["prompt_wait_steps"] > 0
    assert made["learnt"]["step_milliseconds"] != other["learnt"]["step_milliseconds"]


def test_two_ranks_serve_with_as_many_drafts_as_pay(pair, tmp_path):
    """Tensor parallel: heads, inner width and vocabulary are split over two processes.

    The server does not start unless every known answer agrees.
    """
    target, directory = pair
    sizes = {**SIZES, "target_hidden_size": 64}
    checkpoint = write_tiny(tmp_path / "drafter", **sizes, draft_vocab_size=24, own_head=True)
    drafter = load_drafter(checkpoint, target)
    record = ReferenceDrafts(answers=[answer(drafter, target, prompt) for prompt in PROMPTS])
    save_record(checkpoint, record)
    flags = [
        "--speculative-algorithm=DFLASH",
        f"--speculative-draft-model-path={checkpoint}",
        "--tp-size=2",
        "--enable-metrics",
    ]
    log = tmp_path / "log"
    adaptive = {"DFLASH_PLUGIN_ADAPTIVE_VERIFICATION": "1"}
    with serving(log, directory, *flags, **adaptive, SGLANG_CPU_OMP_THREADS_BIND="0|1") as server:
        assert "the drafter's 2 known answers agree" in log.read_text()
        for prompt in PROMPTS:
            made = server.generate(prompt, max_new_tokens=16, ignore_eos=True)
            assert made["output_ids"] == greedy_text(target, prompt, 16)
        params = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
        sampled = server.samples(PROMPTS[0], 16, **params)
        together = tokens(server.batch(PROMPTS, max_new_tokens=24, ignore_eos=True))
        assert together == [greedy_text(target, prompt, 24) for prompt in PROMPTS]
        counted, found = server.info(), server.metrics()
        assert sum(steps > 0 for steps in counted["adaptive"]["steps"].values()) > 2
        assert found["dflash:verify_passes_total"] == counted["verify_passes"]
    assert len({json.dumps(one["output_ids"]) for one in sampled}) > 8
