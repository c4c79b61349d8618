"""The families of docs/targets.md as tiny targets of sizes that engines' kernels on a GPU take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.helpers.families import AXES, Family
from tests.helpers.tiny import VOCABULARY, random_weights, tiny_target, write_target

# What a CPU shows in part or not, those that take longest first; the first two of the others are
# plain and shown by a CPU too, to check the check.
SHOWN = (
    "Qwen3-Next",
    "Qwen3.5",
    "Qwen3.5-MoE",
    "Falcon-H1",
    "Kimi Linear",
    "DeepSeek V2",
    "DeepSeek V3, Kimi K2",
    "Llama",
    "Qwen3",
    "Qwen3-MoE",
    "Gemma 3",
    "Gemma 4",
    "gpt-oss",
    "Qwen3-VL",
    "Mistral",
    "Ministral 3, Mistral 3",
    "GLM 4",
    "Llama 4, up to its first chunk",
)
# Positions of a target, and tokens of a long prompt: a block of the prefix cache beside recurrent
# states holds as many tokens as take a state's bytes.
POSITIONS = 2048
LONG = 1200
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": POSITIONS,
}
# Of a drafter.
DRAFTER = {name: size for name, size in SIZES.items() if name != "max_position_embeddings"}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 128}
SHARED_EXPERT = {"shared_expert_intermediate_size": 128}
# In bfloat16 a choice among experts jumps at near ties.
ALL_EXPERTS: dict[str, Any] = {**EXPERTS, "num_experts_per_tok": 4}
DELTA_RULE: dict[str, Any] = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
LATENT: dict[str, Any] = {
    **ALL_EXPERTS,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
WHOLE = {"attention_chunk_size": POSITIONS, "floor_scale": POSITIONS}
CHANGES: dict[str, dict[str, Any]] = {
    # With a shared expert's width vLLM would make one, and the family has no weights for it.
    "Qwen3-MoE": EXPERTS,
    "Qwen3-Next": {**DELTA_RULE, **ALL_EXPERTS, **SHARED_EXPERT},
    "Qwen3.5": DELTA_RULE,
    "Qwen3.5 text": DELTA_RULE,
    "Qwen3.5-MoE": {**DELTA_RULE, **ALL_EXPERTS, **SHARED_EXPERT},
    "Gemma 3": {"query_pre_attn_scalar": 64},
    "Gemma 4": {"global_head_dim": 128, "num_global_key_value_heads": 2},
    "Qwen3-VL": {"rope_parameters": {**AXES, "mrope_section": [12, 10, 10]}},
    "DeepSeek V2": {**LATENT, "topk_method": "greedy", "scoring_func": "softmax"},
    "DeepSeek V3, Kimi K2": {**LATENT, **NOAUX},
    "DeepSeek V3.2": {**LATENT, **NOAUX},
    "Llama 4, up to its first chunk": {**WHOLE, "intermediate_size_mlp": 256},
    "Falcon-H1": {
        "mamba_d_ssm": 256,
        "mamba_n_heads": 4,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_chunk_size": 64,
    },
    "Kimi Linear": {**LATENT, "q_lora_rank": None, "linear_head_dim": 128, "linear_num_heads": 4},
}


class NoTinyModelError(Exception):
    """The Transformers release here cannot make a family's tiny model."""


def write_sized(
    family: Family, directory: Path, sizes: dict[str, Any], changes: dict[str, Any]
) -> PreTrainedModel:
    """A tiny random target of a family, of other sizes, on disk too.

    Args:
        family: of the target.
        directory: where it goes, with a tokenizer.
        sizes: of the text model's configuration, where the family asks for no other ones.
        changes: of the same, whatever the family asks for.

    Raises:
        NoTinyModelError: Transformers does not have the family, or has it otherwise.
    """
    write_target(directory)
    try:
        target = sized_target(family, sizes, changes)
    except Exception as error:  # Each release has its own ways to say so.
        made_by = f"transformers {transformers.__version__}"
        raise NoTinyModelError(f"no tiny model in {made_by}: {error}") from error
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "kv_b_proj" in name:
                # Its sums are of 512 numbers: as it is, each query would see one key alone.
                parameter.mul_(0.1)
    target.save_pretrained(directory)
    return target


def sized_target(family: Family, sizes: dict[str, Any], changes: dict[str, Any]) -> PreTrainedModel:
    """As ``write_sized``, in memory alone."""
    if "text_config" not in family.changes:
        return tiny_target(family.kind, **{**sizes, **family.changes, **changes})
    text = {**family.changes["text_config"], **sizes, **changes}
    vision = {**family.changes["vision_config"], "out_hidden_size": text["hidden_size"]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.kind, **{**family.changes, "text_config": text, "vision_config": vision}
    )
    target = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return random_weights(target)


def random_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    """Prompts of so many tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def is_recurrent(family: Family) -> bool:
    """Whether layers keep a state."""
    words = ("delta", "Mamba", "convolution", "no attention")
    return any(word in family.trait for word in words)


def dtypes(family: Family) -> list[str]:
    """In which to try a family on a GPU, one after the other.

    The engines' kernels of gated delta rules refuse float32, and those of latent attention have
    none of it.
    """
    if "delta" in family.trait or "latent" in family.trait:
        return ["bfloat16"]
    return ["float32", "bfloat16"]
