"""Where SGLang is let to capture passes over prompts as a whole."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin.sglang import compat, surface
from dflash_plugin.sglang.prompt_graphs import (
    MOST_PROMPTS,
    RUNNER_MODULE,
    capture_prompts,
    reason_against,
    with_shared_output,
)

VERSIONS = ("0.5.17", "0.5.23")


class FlashAttentionBackend:
    use_mla = use_sliding_window_kv_pool = has_local_attention = is_encoder_decoder = False
    is_prefill_aware_swa = False
    fa_impl_ver = 3


class TritonAttnBackend:
    pass


def a_phase() -> SimpleNamespace:
    """SGLang's settings of graphs for prompts."""
    return SimpleNamespace(backend="breakable", full_prefill_max_req=None)


def a_target(**arguments: Any) -> Any:
    args = SimpleNamespace(
        **{
            "cuda_graph_backend_prefill": None,
            "cuda_graph_config": SimpleNamespace(prefill=a_phase()),
            "tp_size": 1,
            "enable_lora": None,
            "enable_hierarchical_cache": False,
            "enable_lmcache": False,
            "enable_flexkv": False,
            "radix_cache_backend": None,
            "debug_cuda_graph": False,
            "disaggregation_mode": "null",
            "enable_two_batch_overlap": False,
            "enable_mixed_chunk": False,
            **arguments,
        }
    )
    model = SimpleNamespace(is_multimodal=False, hf_text_config=SimpleNamespace(num_experts=None))
    return SimpleNamespace(
        server_args=args,
        attn_backend=FlashAttentionBackend(),
        model_config=model,
        token_to_kv_pool=SimpleNamespace(post_capture_active=False),
    )


@pytest.fixture
def published(monkeypatch) -> SimpleNamespace:
    """The settings that SGLang's workers read."""
    config = a_phase()
    bag = SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=SimpleNamespace(prefill=config)))
    context = ModuleType("sglang.srt.runtime_context")
    vars(context)["get_exec"] = lambda: bag
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, context.__name__, context)
    return config


@pytest.fixture(params=VERSIONS)
def version(request, monkeypatch) -> str:
    monkeypatch.setattr(compat, "installed", lambda: request.param)
    monkeypatch.setattr(
        "dflash_plugin.sglang.prompt_graphs.argument", lambda args, name: getattr(args, name)
    )
    return str(request.param)


def test_prompts_are_captured_whole_where_nothing_else_is_asked_for(published, version) -> None:
    target = a_target()
    assert capture_prompts(target)
    assert (published.backend, published.full_prefill_max_req) == ("full", MOST_PROMPTS)
    # Newer versions keep what the user gave there.
    of_arguments = target.server_args.cuda_graph_config.prefill
    assert (of_arguments.backend == "full") is (version == "0.5.17")


def test_a_number_of_prompts_that_is_given_stays(published, version) -> None:
    published.full_prefill_max_req = 4
    assert capture_prompts(a_target())
    assert published.full_prefill_max_req == 4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"cuda_graph_backend_prefill": "breakable"}, "arguments ask for"),
        ({"_cuda_graph_config_locked": {("prefill", "backend")}}, "arguments ask for"),
        ({"tp_size": 2}, "ranks"),
        ({"enable_lora": True}, "LoRA"),
        ({"enable_hierarchical_cache": True}, "layer by layer"),
        ({"enable_lmcache": True}, "layer by layer"),
        ({"enable_flexkv": True}, "layer by layer"),
        ({"radix_cache_backend": "flexkv"}, "layer by layer"),
        # 0.5.20 and later.
        ({"enable_unified_cache_external_linker": True}, "layer by layer"),
        ({"debug_cuda_graph": True}, "debugged"),
        ({"disaggregation_mode": "prefill"}, "layer by layer"),
        ({"enable_two_batch_overlap": True}, "overlap"),
        ({"enable_mixed_chunk": True}, "decode, too"),
    ],
)
def test_arguments_keep_what_sglang_does(published, version, arguments, reason) -> None:
    target = a_target(**arguments)
    assert reason in (reason_against(target, published) or "")
    assert not capture_prompts(target)
    assert published.backend == "breakable"
    assert target.server_args.cuda_graph_config.prefill.backend == "breakable"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("use_mla", "latent"),
        ("use_sliding_window_kv_pool", "windows"),
        ("is_prefill_aware_swa", "windows"),
        ("has_local_attention", "chunked"),
        ("is_encoder_decoder", "encoder"),
    ],
)
def test_targets_that_were_not_measured_keep_what_sglang_does(
    published, version, name, reason
) -> None:
    target = a_target()
    setattr(target.attn_backend, name, True)
    assert reason in (reason_against(target, published) or "")


def test_other_back_ends_and_models_keep_what_sglang_does(published, version) -> None:
    target = a_target()
    target.attn_backend = TritonAttnBackend()
    assert "TritonAttnBackend" in (reason_against(target, published) or "")
    target = a_target()
    target.model_config.is_multimodal = True
    assert "images" in (reason_against(target, published) or "")
    for name in ("num_experts", "moe_num_experts"):
        target = a_target()
        setattr(target.model_config.hf_text_config, name, 8)
        assert "experts" in (reason_against(target, published) or "")
    target = a_target()
    target.attn_backend.fa_impl_ver = 4
    assert "FlashAttention 4" in (reason_against(target, published) or "")


def test_a_cache_that_takes_the_memory_of_passes_without_a_graph_keeps_what_sglang_does(
    published, version
) -> None:
    target = a_target()
    target.token_to_kv_pool.post_capture_active = True
    assert "what graphs leave" in (reason_against(target, published) or "")


@pytest.mark.parametrize("chosen", ["disabled", "tc_piecewise"])
def test_what_sglang_chose_otherwise_stays(published, version, chosen) -> None:
    published.backend = chosen
    assert chosen in (reason_against(a_target(), published) or "")
    assert not capture_prompts(a_target())
    assert published.backend == chosen


class Runner:
    """SGLang's runner, as far as passes are captured with it: it keeps what each returns."""

    max_num_tokens = 8

    def __init__(self, is_full: bool) -> None:
        self._is_full_backend = is_full

    def _run_forward(self, forward_batch: Any, num_tokens: int) -> Any:
        # Hidden states, and the context features of two layers.
        rows = torch.full((num_tokens, 3), float(forward_batch))
        return rows, [rows + 1, rows + 2]


def storages(output: Any) -> set[int]:
    hidden, features = output
    return {part.untyped_storage().data_ptr() for part in (hidden, *features)}


def test_captured_passes_return_their_output_in_the_same_memory() -> None:
    run = with_shared_output(Runner._run_forward)
    runner = Runner(is_full=True)
    largest = run(runner, 10, 8)
    smaller = run(runner, 20, 4)
    assert storages(smaller) == storages(largest)
    assert len(storages(largest)) == 3
    hidden, features = smaller
    assert isinstance(features, list)
    for part, value in zip((hidden, *features), (20, 21, 22), strict=True):
        assert torch.equal(part, torch.full((4, 3), float(value)))


def test_captured_passes_share_their_output_where_sglang_keeps_each_apart(
    published, version, monkeypatch
) -> None:
    native = Runner._run_forward
    module = ModuleType(RUNNER_MODULE)
    vars(module)["PrefillCudaGraphRunner"] = type("PrefillCudaGraphRunner", (Runner,), {})
    monkeypatch.setitem(sys.modules, RUNNER_MODULE, module)
    surface._surface.cache_clear()  # A module is patched once in a process.
    try:
        assert capture_prompts(a_target())
    finally:
        surface._surface.cache_clear()
    # 0.5.22 and later share it themselves.
    patched = vars(module)["PrefillCudaGraphRunner"]._run_forward
    assert (patched is not native) is (version == "0.5.17")


def test_passes_captured_in_parts_return_what_sglang_returns() -> None:
    run = with_shared_output(Runner._run_forward)
    runner = Runner(is_full=False)
    assert storages(run(runner, 10, 8)).isdisjoint(storages(run(runner, 20, 4)))
