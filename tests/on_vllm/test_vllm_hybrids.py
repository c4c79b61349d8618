"""Targets with recurrent layers: the division of the KV cache changes neither text nor drafts.

vLLM's recurrent layers take bfloat16 only on a CPU, in which the shape of a pass decides near ties.
So the engine is compared with itself: as the plugin divides the cache, and as vLLM does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import MambaSpec

from dflash_plugin.vllm import attention, cache_groups
from dflash_plugin.vllm.selfcheck import draft
from tests.helpers.tiny import ENGINE_SIZES, tiny_target, write_target, write_tiny
from tests.on_vllm.vllm_helpers import ON_V2, on_worker, running

LENGTH = 4352
SIZES = {
    **{**ENGINE_SIZES, "head_dim": 64},
    "num_hidden_layers": 8,
    "max_position_embeddings": LENGTH,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# As many bytes as the target's two heads of 64.
DRAFTER = {**ENGINE_SIZES, "num_key_value_heads": 4, "target_hidden_size": 64, "dtype": "bfloat16"}
WINDOW = {"sliding_window": 16}
PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40],
    *([5 + step * i % 91 for i in range(90)] for step in (7, 11, 17, 23)),
]
# Changes to the drafter, layers of the plugin's groups, and vLLM's groups and block sizes.
KINDS: dict[str, tuple[dict[str, Any], list[int], tuple[int, int]]] = {
    "full": ({"layers": ({},)}, [3, 3, 3], (9, 1)),
    "windowed": ({"layers": (WINDOW,)}, [2, 2, 2, 2, 1], (9, 1)),
    # Twice the target's bytes, so two pages; half of them, so a padded one.
    "wide": ({"layers": (WINDOW,), "head_dim": 64}, [2, 2, 2, 2, 2], (9, 2)),
    "narrow": ({"layers": (WINDOW,), "num_key_value_heads": 2}, [2, 2, 2, 2, 1], (9, 2)),
}
# Which division holds the most tokens depends on the back end's blocks.
MIXED: dict[str, tuple[dict[str, Any], None, tuple[int, int]]] = {
    "windowed and full": ({"layers": (WINDOW, {})}, None, (5, 1)),
    "wide, windowed and full": ({"layers": (WINDOW, {}), "head_dim": 64}, None, (5, 2)),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    directory = write_target(tmp_path_factory.mktemp("hybrid"))
    tiny_target("qwen3_next", **SIZES).save_pretrained(directory)
    return directory


def division(worker: Any) -> tuple[list[int], int]:
    """Layers of each group of the cache, and the number of block sizes of attention."""
    groups = worker.model_runner.kv_cache_config.kv_cache_groups
    kinds = [group.kv_cache_spec for group in groups]
    blocks = {kind.block_size for kind in kinds if not isinstance(kind, MambaSpec)}
    return [len(group.layer_names) for group in groups], len(blocks)


def served(
    target: Path, drafter: Path
) -> tuple[tuple[list[int], int], list[list[int]], list[list[int]]]:
    """Division of the cache, texts, and drafts after the prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    # The V1 runner copies states of cached prefixes with a Triton kernel.
    settings = {"enable_prefix_caching": False, "max_num_batched_tokens": 1024}
    settings |= {"dtype": "bfloat16", "max_model_len": LENGTH}
    with running(target, drafter, **settings) as engine:
        drafts = [on_worker(engine, draft, [*prompt, 42]) for prompt in PROMPTS]
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        return on_worker(engine, division), texts, drafts


@pytest.mark.skipif(ON_V2 and not torch.cuda.is_available(), reason="too slow interpreted")
@pytest.mark.parametrize("kind", KINDS if not ON_V2 else MIXED)
def test_fewer_groups_change_neither_text_nor_drafts(target, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    changes, expected, natively = {**KINDS, **MIXED}[kind]
    drafter = write_tiny(tmp_path, **{**DRAFTER, **changes, "num_target_layers": 8})
    groups, texts, drafts = served(target, drafter)
    assert len(groups[0]) <= 5
    assert groups[1] == 1
    assert expected in (None, groups[0])
    monkeypatch.setattr(cache_groups, "split", lambda config, specs: (list(specs), []))
    monkeypatch.setattr(attention, "page_count", lambda *sizes: 1)
    monkeypatch.setattr(attention, "as_large_as_target", lambda spec, config: spec)
    native_groups, native_texts, native_drafts = served(target, drafter)
    assert (len(native_groups[0]), native_groups[1]) == natively
    assert drafts == native_drafts
    assert texts == native_texts
    assert len({tuple(one) for one in drafts}) > 1, "the context matters"
