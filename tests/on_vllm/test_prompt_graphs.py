"""Graphs of whole passes that read prompts, over vLLM's own tables of graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from dflash_plugin.vllm import compat
from dflash_plugin.vllm.prompt_graphs import PADDING, add_mixed_passes, reason_against, spread

pytestmark = pytest.mark.skipif(
    compat.installed().startswith("0.31"), reason="captured in parts before 0.32"
)

SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 1025, 16)]
BLOCK = 16


def a_manager(varlen: bool, mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> Any:
    """vLLM's table of graphs, without a GPU to capture them on."""
    manager = SimpleNamespace(
        vllm_config=SimpleNamespace(
            speculative_config=None,
            num_speculative_tokens=BLOCK - 1,
            cache_config=SimpleNamespace(use_kda_recoverssm=False, kv_sharing_fast_prefill=False),
            model_config=SimpleNamespace(is_multimodal_model=False, enable_prompt_embeds=False),
            parallel_config=SimpleNamespace(data_parallel_size=1),
            lora_config=None,
            kv_transfer_config=None,
        ),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1]
        ),
        cudagraph_mode=mode,
        max_num_reqs=128,
        decode_query_len=BLOCK,
        varlen_decode=varlen,
        lora_capture_cases=[0],
        ubatch_runner=None,
        _candidates={},
        _capture_descs={},
        _graphs_captured=True,
        _resolve_effective_loras=lambda loras: loras,
        _maybe_ubatch_twin=lambda desc: None,
    )
    CudaGraphManager._init_candidates(manager)
    return manager


def dispatched(manager: Any, requests: int, tokens: int, uniform: int | None, most: int | None):
    return CudaGraphManager.dispatch(manager, requests, tokens, uniform, 0, most)


@pytest.mark.parametrize("varlen", [False, True])
def test_passes_that_read_prompts_replay_a_whole_graph(varlen: bool) -> None:
    manager = a_manager(varlen)
    before = dispatched(manager, 9, 8 * BLOCK + 100, None, None)
    add_mixed_passes(manager)
    # Eight requests verify a block each, and a ninth one's prompt has 100 tokens.
    found = dispatched(manager, 9, 8 * BLOCK + 100, None, None)
    assert before.cg_mode == CUDAGraphMode.PIECEWISE
    assert found.cg_mode == CUDAGraphMode.FULL
    assert found.uniform_token_count is None
    assert found.max_query_len is None
    assert found.num_reqs >= 9
    assert found in manager._capture_descs[CUDAGraphMode.FULL]
    # More rows than any graph has.
    assert dispatched(manager, 2, 1100, None, None).cg_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize("varlen", [False, True])
def test_passes_that_verify_alone_replay_what_they_did(varlen: bool) -> None:
    plain, manager = a_manager(varlen), a_manager(varlen)
    add_mixed_passes(manager)
    for requests in (1, 3, 8, 40, 64):
        rows = requests * BLOCK
        whole = requests, rows, BLOCK, BLOCK
        assert dispatched(manager, *whole) == dispatched(plain, *whole)
        assert dispatched(manager, *whole).cg_mode == CUDAGraphMode.FULL


def test_every_pass_that_had_a_graph_has_one() -> None:
    manager = a_manager(varlen=True)
    add_mixed_passes(manager)
    for tokens in range(1, SIZES[-1] + 1):
        found = dispatched(manager, min(tokens, 128), tokens, None, None)
        assert found.cg_mode == CUDAGraphMode.FULL
        assert found.num_tokens >= tokens


@pytest.mark.parametrize("varlen", [False, True])
def test_no_graph_is_captured_that_no_pass_replays(varlen: bool) -> None:
    manager = a_manager(varlen)
    add_mixed_passes(manager)
    captured = {one for found in manager._capture_descs.values() for one in found}
    assert captured == {one for found in manager._candidates.values() for one in found}
    assert {one.cg_mode for one in captured} == {CUDAGraphMode.FULL}


def test_a_table_is_extended_once_and_longest_passes_come_first() -> None:
    manager = a_manager(varlen=True)
    add_mixed_passes(manager)
    captured = list(manager._capture_descs[CUDAGraphMode.FULL])
    add_mixed_passes(manager)
    assert manager._capture_descs[CUDAGraphMode.FULL] == captured
    assert len(set(captured)) == len(captured)
    rows = [one.num_tokens for one in captured]
    assert rows == sorted(rows, reverse=True)


def test_sizes_that_are_left_out_pad_little() -> None:
    kept = spread(SIZES)
    assert kept[-1] == SIZES[-1]
    assert set(kept) <= set(SIZES)
    assert len(kept) < 0.75 * len(SIZES)
    for size in SIZES:
        held_by = next(one for one in kept if one >= size)
        assert held_by <= size * (1 + PADDING)


def test_no_sizes_give_none() -> None:
    assert spread([]) == []


def a_group(kind: type[Any], support: AttentionCGSupport, **state: Any) -> Any:
    """Layers whose builder is of a kind of vLLM's, without a device for its buffers."""
    builder = object.__new__(kind)
    vars(builder).update(state, get_cudagraph_support=lambda config, spec: support)
    return SimpleNamespace(
        backend=SimpleNamespace(__name__="SomeBackend"),
        kv_cache_spec=None,
        get_metadata_builder=lambda ubatch: builder,
    )


def flash(head_size: int = 128, ahead: bool = True) -> Any:
    """Layers on FlashAttention 3, or on 4, which makes no schedule ahead of a pass."""
    state = {"aot_schedule": ahead, "headdim": head_size}
    return a_group(FlashAttentionMetadataBuilder, AttentionCGSupport.ALWAYS, **state)


def triton() -> Any:
    return a_group(TritonAttentionMetadataBuilder, AttentionCGSupport.ALWAYS)


def test_attention_that_takes_any_mix_is_captured() -> None:
    assert reason_against(a_manager(varlen=True), [[flash()], [triton()]]) is None


def test_attention_that_takes_one_length_is_not() -> None:
    one_length = a_group(FlashAttentionMetadataBuilder, AttentionCGSupport.UNIFORM_BATCH)
    assert "SomeBackend" in (reason_against(a_manager(True), [[flash()], [one_length]]) or "")


def test_attention_that_takes_any_mix_of_verify_rows_alone_is_not() -> None:
    from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder

    group = a_group(MLACommonMetadataBuilder, AttentionCGSupport.ALWAYS, reorder_batch_threshold=16)
    # A pass of one prompt of 64 tokens, as vLLM captures one.
    prompt = SimpleNamespace(num_reqs=64, num_actual_tokens=64, max_query_len=64)
    with pytest.raises(AssertionError):
        group.get_metadata_builder(0).build_for_cudagraph_capture(prompt)
    assert "SomeBackend" in (reason_against(a_manager(True), [[flash()], [group]]) or "")


@pytest.mark.parametrize(
    ("head_size", "ahead", "windows", "is_captured"),
    [
        (64, True, [None], False),
        (256, True, [(4095, 0)], False),
        (64, True, [None, (127, 0)], True),
        (64, False, [None], True),
        (96, True, [None], True),
    ],
)
def test_schedules_ahead_fit_the_graphs(
    head_size: int,
    ahead: bool,
    windows: list[Any],
    is_captured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash_attn, "_get_sliding_window_configs", lambda config: set(windows))
    reason = reason_against(a_manager(varlen=True), [[flash(head_size, ahead)]])
    assert (reason is None) is is_captured


@pytest.mark.parametrize(
    ("where", "name", "value", "reason"),
    [
        ("model_config", "is_multimodal_model", True, "images"),
        ("model_config", "enable_prompt_embeds", True, "embeddings"),
        ("parallel_config", "data_parallel_size", 2, "data parallelism"),
        ("cache_config", "kv_sharing_fast_prefill", True, "between layers"),
        (None, "lora_config", object(), "LoRA"),
        (None, "kv_transfer_config", object(), "layer by layer"),
    ],
)
def test_what_the_host_does_between_layers_keeps_parts(where, name, value, reason) -> None:
    manager = a_manager(varlen=True)
    config = manager.vllm_config
    setattr(getattr(config, where) if where else config, name, value)
    assert reason in (reason_against(manager, [[flash()]]) or "")


def test_another_mode_of_graphs_is_left_alone() -> None:
    manager = a_manager(varlen=False, mode=CUDAGraphMode.PIECEWISE)
    assert "PIECEWISE" in (reason_against(manager, []) or "")
