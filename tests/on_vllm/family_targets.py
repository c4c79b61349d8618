"""The families of docs/targets.md as tiny targets of sizes that vLLM runs, on a CPU or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tests.helpers import gpu_families
from tests.helpers.device import ON_GPU
from tests.helpers.families import AXES, YARN_WITH_QUERY_SCALE, Family
from tests.helpers.gpu_families import is_recurrent, write_sized
from tests.helpers.tiny import ENGINE_SIZES
from tests.on_vllm.vllm_helpers import ON_V2

# Of as many tokens as a block of the cache may hold beside a recurrent state.
LENGTH = 2048
# Of models whose heads are as wide as their number says.
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
EIGHT_STATES = {"mamba_n_heads": 8}
# In bfloat16 a choice among experts jumps at near ties.
ALL_EXPERTS = {"num_experts_per_tok": 4}
LATENT = {
    **ALL_EXPERTS,
    "topk_method": "noaux_tc",
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 64,
}
DELTA_RULE = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "head_dim": 64}
# What vLLM's CPU kernels want beside ``ENGINE_SIZES``.
CHANGES: dict[str, dict[str, Any]] = {
    "Qwen2, Qwen2.5": WIDE_HEADS,
    "Qwen2-MoE": WIDE_HEADS,
    "Gemma 4": {"global_head_dim": 32, "num_global_key_value_heads": 2},
    "GPT-2": WIDE_HEADS,
    "OPT": {**WIDE_HEADS, "word_embed_proj_dim": 64},
    # vLLM's rotation of fewer than 16 columns ends the process.
    "GPT-NeoX": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "BLOOM": WIDE_HEADS,
    "Bamba": {**EIGHT_STATES, **WIDE_HEADS},
    "Falcon-H1": {**EIGHT_STATES, "mamba_d_ssm": 128},
    "Granite 4": {**EIGHT_STATES, **WIDE_HEADS},
    "LFM2": WIDE_HEADS,
    "Jamba": WIDE_HEADS,
    "Mamba-2": {"num_heads": 8},
    "Ministral 3, Mistral 3": {"rope_parameters": {**YARN_WITH_QUERY_SCALE, "factor": 32.0}},
    "Llama 4, up to its first chunk": {"attention_chunk_size": 128, "floor_scale": 128},
    # A chunk is whole blocks of the cache.
    "Llama 4, beyond a chunk": {"attention_chunk_size": 32},
    "Llama 4, beyond its floor scale": {"attention_chunk_size": 128},
    "DeepSeek V2": LATENT,
    "DeepSeek V3, Kimi K2": LATENT,
    "DeepSeek V3.2": LATENT,
    "Kimi Linear": LATENT,
    "Qwen3-VL": {"rope_parameters": {**AXES, "mrope_section": [6, 5, 5]}},
    "Qwen3-Next": {**DELTA_RULE, **ALL_EXPERTS},
    "Qwen3.5": DELTA_RULE,
    "Qwen3.5 text": DELTA_RULE,
    "Qwen3.5-MoE": {**DELTA_RULE, **ALL_EXPERTS},
}
TARGETS_WITH_IMAGES = ("qwen3_5", "qwen3_5_moe", "qwen3_vl")
# Captured passes of up to eight requests, whole blocks among them.
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32],
}


def dtypes(family: Family) -> list[str]:
    """In which to try it, one after the other."""
    if ON_GPU:
        return gpu_families.dtypes(family)
    if "latent" in family.trait:
        # What a drafter's layers can have a cache beside.
        return ["bfloat16"]
    return ["float32", "bfloat16"] if is_recurrent(family) else ["float32"]


def write_family(family: Family, directory: Path) -> PreTrainedModel:
    """A tiny random target of the family, on disk too, of sizes that vLLM runs here."""
    changes = CHANGES.get(family.name, {})
    if ON_GPU:
        changes = {**changes, **gpu_families.CHANGES.get(family.name, {})}
        return write_sized(family, directory, gpu_families.SIZES, changes)
    changes = {**changes, "max_position_embeddings": LENGTH}
    return write_sized(family, directory, ENGINE_SIZES, changes)


def settings(family: Family, dtype: str) -> dict[str, Any]:
    """Of the engine."""
    found: dict[str, Any] = {"dtype": dtype, "max_model_len": 256, "max_num_batched_tokens": 64}
    if is_recurrent(family):
        # Blocks of the cache are longer, and the V1 runner's cached states want Triton.
        found |= {"max_num_batched_tokens": LENGTH, "max_model_len": LENGTH}
        found |= {} if ON_V2 else {"enable_prefix_caching": False}
    if ON_GPU:
        found |= on_gpu(family)
    if family.kind in TARGETS_WITH_IMAGES:
        found |= {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    return found


def on_gpu(family: Family) -> dict[str, Any]:
    """Settings of an engine that shares a GPU with others and starts soon."""
    found: dict[str, Any] = {
        "max_model_len": gpu_families.POSITIONS,
        "enforce_eager": False,
        "compilation_config": GRAPHS,
        # Of the GPU, which must be free when the engine starts; the cache has its own limit.
        "gpu_memory_utilization": 0.04,
        "kv_cache_memory_bytes": 1 << 30,
        # The long prompt is read in chunks.
        "max_num_batched_tokens": LENGTH if is_recurrent(family) else 256,
    }
    # The core drafts with the checkpoint's weights.
    found["additional_config"] = {"dflash_plugin": {"draft_weights": "checkpoint"}}
    if "delta" in family.trait:
        # vLLM's choice on this GPU is FlashInfer's, which compiles for minutes.
        found["additional_config"]["gdn_prefill_backend"] = "triton"
    return found
