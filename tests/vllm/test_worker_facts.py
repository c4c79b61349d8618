"""What a warm worker tells of its attention back ends and of the draft's CUDA graphs."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from dflash_plugin.serving.prometheus import WORKER_FACTS
from dflash_plugin.vllm import cache_groups
from dflash_plugin.vllm.worker_facts import read_facts, worker_facts

BASE = "vllm.model_executor.layers.attention_layer_base"


class Layer:
    def __init__(self, name: str) -> None:
        self.name = name

    def get_attn_backend(self) -> SimpleNamespace:
        return SimpleNamespace(get_name=lambda: self.name)


@pytest.mark.parametrize(
    ("is_v2", "mode", "graphs"),
    # A draft attention without full graphs leaves its manager without a mode, whatever is set.
    [(False, None, "no"), (True, 2, "yes"), (True, 0, "no")],
    ids=["v1", "v2", "v2 without"],
)
def test_back_ends_and_graphs_of_a_worker(monkeypatch, is_v2, mode, graphs):
    module = ModuleType(BASE)
    module.AttentionLayerBase = Layer
    monkeypatch.setitem(sys.modules, BASE, module)
    monkeypatch.setattr(cache_groups, "drafter_spec", lambda config: config)
    layers = {
        "model.layers.0.linear_attn": Layer("GDN_ATTN"),
        "model.layers.1.self_attn.attn": Layer("FLASHINFER"),
        "model.layers.1.mlp.experts": object(),
        "model.layers.2.self_attn.attn": Layer("FLASH_ATTN"),
        "model.layers.3.self_attn.attn": Layer("FLASH_ATTN"),
    }
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2),
        speculative_config="dflash",
        use_v2_model_runner=is_v2,
    )
    manager = SimpleNamespace(cudagraph_mode=mode)
    runner = SimpleNamespace()
    if is_v2:
        runner.speculator = SimpleNamespace(query_cudagraph_manager=manager)
    counts = worker_facts(SimpleNamespace(vllm_config=config, model_runner=runner))
    assert set(counts.values()) == {1}
    expected = ("FLASHINFER+GDN_ATTN", "FLASH_ATTN", graphs)
    assert read_facts(["steps:4", *counts]) == dict(zip(WORKER_FACTS, expected, strict=True))


def test_other_counts_are_no_facts():
    assert read_facts(["steps:4", "saved", "kv_cache_groups"]) == {}
