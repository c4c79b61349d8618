"""The families of docs/targets.md as tiny targets of sizes that vLLM runs on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.helpers.families import AXES, YARN_WITH_QUERY_SCALE, Family
from tests.helpers.tiny import ENGINE_SIZES, random_weights, tiny_target, write_target
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


def dtypes(family: Family) -> list[str]:
    """In which to try it, one after the other."""
    if "latent" in family.trait:
        # What a drafter's layers can have a cache beside.
        return ["bfloat16"]
    return ["float32", "bfloat16"] if is_recurrent(family) else ["float32"]


def is_recurrent(family: Family) -> bool:
    """Whether layers keep a state."""
    words = ("delta", "Mamba", "convolution", "no attention")
    return any(word in family.trait for word in words)


def write_family(family: Family, directory: Path) -> PreTrainedModel:
    """A tiny random target of the family, on disk too, of sizes that vLLM runs on a CPU."""
    write_target(directory)
    changes = {**ENGINE_SIZES, **family.changes, **CHANGES.get(family.name, {})}
    changes["max_position_embeddings"] = LENGTH
    if family.kind in TARGETS_WITH_IMAGES:
        text = {**family.changes["text_config"], **ENGINE_SIZES, **CHANGES[family.name]}
        text["max_position_embeddings"] = LENGTH
        vision = {**family.changes["vision_config"], "out_hidden_size": text["hidden_size"]}
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family.kind, **{**family.changes, "text_config": text, "vision_config": vision}
        )
        target = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        target = random_weights(target)
    else:
        target = tiny_target(family.kind, **changes)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "kv_b_proj" in name:
                # Its sums are of 512 numbers: as it is, each query would see one key alone.
                parameter.mul_(0.1)
    target.save_pretrained(directory)
    return target


def settings(family: Family, dtype: str) -> dict[str, Any]:
    """Of the engine."""
    found: dict[str, Any] = {"dtype": dtype, "max_model_len": 256, "max_num_batched_tokens": 64}
    if is_recurrent(family):
        # Blocks of the cache are longer, and the V1 runner's cached states want Triton.
        found |= {"max_num_batched_tokens": LENGTH, "max_model_len": LENGTH}
        found |= {} if ON_V2 else {"enable_prefix_caching": False}
    if family.kind in TARGETS_WITH_IMAGES:
        found |= {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    return found
