"""Targets that are split up, adapted, rounded or cached on the host: the text stays their own.

Torch stands in for what SGLang has for GPUs alone (``schedulers.stand_in``).
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from dflash_plugin.transformers.loading import load_drafter
from tests.helpers.adapters import write_adapter
from tests.helpers.greedy import greedy_text
from tests.helpers.int8 import write_int8_target
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.helpers.tiny import write_tiny
from tests.on_sglang.checks import check_core
from tests.on_sglang.sglang_server import serving, tokens

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40], [50, 51, 52, 53]]
FIRST = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40] * 3
OTHERS = [[50 + i % 40 for i in range(40)], [30 + i % 50 for i in range(44)]]
# Holds one request and a part of the next.
SLOTS, TOKENS = 96, 12
REFUSED: dict[str, dict[str, Any]] = {
    "--pp-size is 2": {"pp_size": 2},
    "--enable-dp-attention or --attn-dp-size is set": {
        "enable_dp_attention": True,
        "dp_size": 2,
        "tp_size": 2,
    },
    "--disaggregation-mode is 'decode'": {"disaggregation_mode": "decode"},
    "--attn-cp-size is 2": {"attn_cp_size": 2, "tp_size": 2},
    "--enable-two-batch-overlap is set": {"enable_two_batch_overlap": True},
}


@pytest.mark.parametrize("widths", [None, [3, 1, 4, 2]], ids=["whole blocks", "cut passes"])
def test_requests_with_and_without_adapters(pair, schedulers, tmp_path, widths):
    target, directory = pair
    checkpoint = write_tiny(tmp_path / "drafter", **SIZES, target_hidden_size=64)
    first = write_adapter(tmp_path / "first", target, seed=1)
    second = write_adapter(tmp_path / "second", target, seed=2)
    made = schedulers.run(
        directory,
        checkpoint,
        PROMPTS,
        copies=4,
        adapters=[None, tmp_path / "first", tmp_path / "second", tmp_path / "first"],
        widths=widths,
        temperature=0.0,
        max_new_tokens=24,
        ignore_eos=True,
    )
    for prompt, texts in zip(PROMPTS, made["texts"], strict=True):
        expected = [greedy_text(model, prompt, 24) for model in (target, first, second, first)]
        assert len({tuple(text) for text in expected}) == 3
        assert texts == expected


def test_a_quantised_target_leaves_the_drafter_as_it_is(pair, schedulers, tmp_path):
    """Its int8 linears are SGLang's; one such in the drafter would find no scales."""
    target, directory = pair
    shutil.copytree(directory, tmp_path / "target")
    rounded = write_int8_target(tmp_path / "target", target)
    checkpoint = write_tiny(tmp_path / "drafter", **SIZES, target_hidden_size=64)
    drafter = load_drafter(checkpoint, rounded)
    made = schedulers.run(
        tmp_path / "target", checkpoint, PROMPTS, settings={"quantization": "w8a8_int8"},
        temperature=0.0, max_new_tokens=16, ignore_eos=True,
    )  # fmt: skip
    check_core(made, PROMPTS, rounded, drafter, 16)
    assert greedy_text(rounded, PROMPTS[0], 16) != greedy_text(target, PROMPTS[0], 16)


def test_a_prompt_comes_back_from_the_hosts_cache(pair, schedulers, tmp_path):
    """One request at a time: the last is the first again, and drafts what the first did.

    Other requests have used its slots since; the drafter's cache comes from the host as well.
    """
    target, directory = pair
    checkpoint = write_tiny(tmp_path, **SIZES, target_hidden_size=64)
    prompts = [FIRST, *OTHERS, FIRST]
    made = schedulers.run(
        directory,
        checkpoint,
        prompts,
        together=True,
        settings={
            "enable_hierarchical_cache": True,
            "hicache_io_backend": "direct",
            "hicache_mem_layout": "layer_first",
            "hicache_write_policy": "write_through",
            "hicache_ratio": 4.0,
            "max_running_requests": 1,
            "max_total_tokens": SLOTS,
        },
        temperature=0.0,
        max_new_tokens=TOKENS,
        ignore_eos=True,
    )
    assert made["texts"] == [greedy_text(target, prompt, TOKENS) for prompt in prompts]
    assert made["from_host"][:-1] == [0, 0, 0]
    assert made["from_host"][-1] >= len(FIRST) - 1
    passes = made["blocks"].index(made["blocks"][0], 1)
    again = made["blocks"][passes:]
    assert len(again) > 4
    assert again == made["blocks"][: len(again)]


@pytest.mark.parametrize("refusal", REFUSED)
def test_what_the_plugin_does_not_run_with(pair, schedulers, tmp_path, refusal):
    """SGLang gets as far as our message; there is no model to load."""
    checkpoint = write_tiny(tmp_path / "drafter", **SIZES, target_hidden_size=64)
    (tmp_path / "target").mkdir()
    shutil.copy(pair[1] / "config.json", tmp_path / "target")
    with pytest.raises(AssertionError, match=f"DFlashError: {refusal}"):
        schedulers.run(tmp_path / "target", checkpoint, PROMPTS, settings=REFUSED[refusal])


def test_two_replicas_serve_with_as_many_drafts_as_pay(pair, tmp_path):
    """Data parallel: each replica has a scheduler, a drafter and a policy of its own."""
    target, directory = pair
    checkpoint = write_tiny(tmp_path / "drafter", **SIZES, target_hidden_size=64)
    prompts = [*PROMPTS, [7, 8, 9], [60, 61, 62, 63, 64]]
    flags = [
        "--speculative-algorithm=DFLASH",
        f"--speculative-draft-model-path={checkpoint}",
        "--dp-size=2",
        "--enable-metrics",
    ]
    environment = {
        "DFLASH_PLUGIN_ADAPTIVE_VERIFICATION": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    }
    with serving(tmp_path / "log", directory, *flags, **environment) as server:
        together = tokens(server.batch(prompts, max_new_tokens=60, ignore_eos=True))
        assert together == [greedy_text(target, prompt, 60) for prompt in prompts]
        states = server.client.get("/server_info").json()["internal_states"]
        found = server.metrics()
    passes = [state["dflash_plugin"]["verify_passes"] for state in states]
    assert len(passes) == 2
    assert min(passes) > 0
    assert found["dflash:verify_passes_total"] == sum(passes)
    for state in states:
        steps = state["dflash_plugin"]["adaptive"]["steps"]
        assert sum(number > 0 for number in steps.values()) > 1
