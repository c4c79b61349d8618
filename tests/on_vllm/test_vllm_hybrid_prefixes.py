"""Cached prefixes of a target with recurrent layers, on the V2 runner.

The engine is compared with itself, as in ``test_vllm_hybrids``: as the plugin divides the cache,
and as vLLM does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from dflash_plugin.vllm import attention, cache_groups
from tests.helpers.tiny import tiny_target, write_target, write_tiny
from tests.on_vllm.test_vllm_hybrids import DRAFTER, SIZES, WINDOW, division
from tests.on_vllm.vllm_helpers import ON_V2, on_worker, running

# Rows of attention so wide that a state is as large as 160 of them.
TARGET = {**SIZES, "num_key_value_heads": 4, "head_dim": 128}
BLOCK, CHUNK = 160, 192
PROMPT = [5 + 7 * i % 91 for i in range(200)]
PROMPTS = [PROMPT, PROMPT, PROMPT[:170] + [5 + 11 * i % 91 for i in range(20)]]
# A layer frees blocks behind its window, and each has two pages.
LAYERS = {"layers": (WINDOW, {}), "num_attention_heads": 4, "head_dim": 256}


def last_drafts(worker: Any) -> list[int]:
    """What was drafted last for the first request."""
    drafts: list[int] = worker.model_runner.speculator.draft_tokens[0].tolist()
    return drafts


def served(target: Path, drafter: Path) -> tuple[Any, list[Any]]:
    """Division of the cache; and cached tokens, text and last drafts for each prompt in turn."""
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    settings = {"dtype": "bfloat16", "max_model_len": 4352, "max_num_seqs": 1}
    settings |= {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": True}
    found = []
    with running(target, drafter, **settings) as engine:
        for prompt in PROMPTS:
            [output] = engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
            text = list(output.outputs[0].token_ids)
            found.append((output.num_cached_tokens, text, on_worker(engine, last_drafts)))
        return on_worker(engine, division), found


@pytest.mark.skipif(not ON_V2, reason="V1 copies states of cached prefixes with a Triton kernel")
def test_fewer_groups_change_neither_prefix_hits_nor_what_follows(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    target = write_target(tmp_path)
    tiny_target("qwen3_next", **TARGET).save_pretrained(target)
    changes = {**DRAFTER, **LAYERS, "num_target_layers": 8}
    drafter = write_tiny(tmp_path / "drafter", **changes)
    groups, found = served(target, drafter)
    assert groups == ([3, 3, 4, 2], 1)
    assert [cached for cached, _, _ in found] == [0, BLOCK, BLOCK]
    monkeypatch.setattr(cache_groups, "split", lambda config, specs: (list(specs), []))
    monkeypatch.setattr(attention, "page_count", lambda *sizes: 1)
    native_groups, native = served(target, drafter)
    # Natively the target's blocks are as large as the drafter's two pages, and hits end at those.
    assert native_groups[1] == 2
    assert [cached for cached, _, _ in native] == [0, 0, 0]
    assert [one[1:] for one in found] == [one[1:] for one in native]
    assert found[0][1:] == found[1][1:]
    assert found[2][2] != found[0][2], "the context matters"
