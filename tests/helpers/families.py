"""Families of targets as tiny random models, and what the Transformers engine does with each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine, Request
from tests.helpers.greedy import greedy_text
from tests.helpers.tiny import SIZES, VOCABULARY, tiny_drafter, tiny_target

NEW_TOKENS = 12
MAX_LENGTH = 48
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
# Latent attention: keys and values differ in width.
LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 2,
}
DELTA_RULE: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "full_attention_interval": 2,  # The same, for SGLang.
}
SHARED_EXPERT: dict[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 24}
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
}
AXES: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
YARN_WITH_QUERY_SCALE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
LLAMA4: dict[str, Any] = {
    "num_local_experts": 4,
    "intermediate_size_mlp": 48,
    "layer_types": ["chunked_attention", "full_attention"] * 2,
    "no_rope_layers": [1, 0, 1, 0],
    "interleave_moe_layer_step": 2,
}


def nested(**text: Any) -> dict[str, Any]:
    """Changes of a configuration whose text model has one of its own."""
    return {"text_config": {**SIZES, **text}, "vision_config": VISION}


@dataclass(frozen=True)
class Family:
    """One row of the table of targets.

    Attributes:
        name: as people call it.
        kind: Transformers' model type.
        trait: what is special about its layers.
        changes: of the tiny configuration.
        refusal: what the engine's refusal says, or None where it serves.
        drafts: whether it runs with a drafter where it is served.
    """

    name: str
    kind: str
    trait: str
    changes: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    drafts: bool = True


FAMILIES = (
    Family("Llama", "llama", "full attention"),
    Family("Qwen2, Qwen2.5", "qwen2", "full attention"),
    Family("Qwen3", "qwen3", "full attention, normed heads"),
    Family("Qwen2-MoE", "qwen2_moe", "experts", SHARED_EXPERT),
    Family("Qwen3-MoE", "qwen3_moe", "experts", EXPERTS),
    Family(
        "Qwen3-Next", "qwen3_next", "gated delta rule, experts", {**DELTA_RULE, **SHARED_EXPERT}
    ),
    Family("Qwen3.5", "qwen3_5", "gated delta rule, nested text model", nested(**DELTA_RULE)),
    Family("Qwen3.5 text", "qwen3_5_text", "gated delta rule", DELTA_RULE),
    Family(
        "Qwen3.5-MoE",
        "qwen3_5_moe",
        "gated delta rule, experts, nested text model",
        nested(**DELTA_RULE, **SHARED_EXPERT),
    ),
    Family(
        "Gemma 2",
        "gemma2",
        "sliding window, soft-caps",
        {"sliding_window": 9, "query_pre_attn_scalar": 8},
    ),
    Family(
        "Gemma 3",
        "gemma3_text",
        "sliding window, two rotations",
        {"sliding_window": 9, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
    ),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        "several streams a layer, shared keys and values",
        {
            "layer_types": ALTERNATING,
            "sliding_window": 9,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "intermediate_size": [48] * 4,
        },
        drafts=False,
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        "sliding window, inputs by layer, shared keys and values",
        {
            "layer_types": ALTERNATING,
            "sliding_window": 9,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    Family(
        "gpt-oss",
        "gpt_oss",
        "sinks, sliding window, experts",
        {"sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        "Qwen3-VL",
        "qwen3_vl",
        "positions on several axes",
        {
            "text_config": {**SIZES, "rope_parameters": AXES},
            "vision_config": {**VISION, "deepstack_visual_indexes": [0]},
        },
    ),
    Family("Mistral", "mistral", "sliding window", {"sliding_window": 9}),
    Family("Mixtral", "mixtral", "experts", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "Ministral 3, Mistral 3",
        "ministral3",
        "queries scaled by position",
        {"rope_parameters": YARN_WITH_QUERY_SCALE},
    ),
    Family("GLM 4", "glm4", "half of each head rotated"),
    Family("DeepSeek V2", "deepseek_v2", "latent attention, experts", LATENT),
    Family("DeepSeek V3, Kimi K2", "deepseek_v3", "latent attention, experts", LATENT),
    Family(
        "DeepSeek V3.2",
        "deepseek_v32",
        "sparse attention",
        LATENT,
        refusal="chooses its keys by an index",
    ),
    Family(
        "Llama 4, up to its first chunk",
        "llama4_text",
        "chunked attention, queries scaled by position",
        {**LLAMA4, "attention_chunk_size": 64, "floor_scale": 64},
    ),
    Family(
        "Llama 4, beyond a chunk",
        "llama4_text",
        "chunked attention",
        {**LLAMA4, "attention_chunk_size": 16},
        refusal="has attention_chunk_size 16",
    ),
    Family(
        "Llama 4, beyond its floor scale",
        "llama4_text",
        "queries scaled by position",
        {**LLAMA4, "attention_chunk_size": 64, "floor_scale": 8},
        refusal="has floor_scale 8",
    ),
    Family("Cohere", "cohere", "parallel sublayers"),
    Family("Cohere 2", "cohere2", "sliding window, full layers without rotation",
           {"sliding_window": 9, "layer_types": ALTERNATING}),
    Family("Phi-3", "phi3", "full attention"),
    Family("GPT-2", "gpt2", "learned positions"),
    Family("OPT", "opt", "learned positions", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("GPT-NeoX", "gpt_neox", "part of each head rotated"),
    Family("Bamba", "bamba", "Mamba-2", {"attn_layer_indices": [1, 3], **MAMBA2}),
    Family("Falcon-H1", "falcon_h1", "Mamba-2 beside attention", {"mamba_d_ssm": 64, **MAMBA2}),
    Family(
        "Granite 4",
        "granitemoehybrid",
        "Mamba-2, experts",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            **MAMBA2,
        },
    ),
    Family(
        "Nemotron-H",
        "nemotron_h",
        "Mamba-2, layers without state",
        {
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "n_groups": 1,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
    Family(
        "Zamba 2",
        "zamba2",
        "Mamba-2, shared attention",
        {
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "num_key_value_heads": 4,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "chunk_size": 8,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
        },
    ),
    Family("LFM2", "lfm2", "short convolutions", {"layer_types": ["conv", "full_attention"] * 2}),
    Family(
        "OLMo hybrid", "olmo_hybrid", "gated delta rule", {**DELTA_RULE, "linear_num_key_heads": 4}
    ),
    Family(
        "Kimi Linear",
        "kimi_linear",
        "delta attention, latent attention",
        {
            **LATENT,
            "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
    ),
    Family(
        "Mamba-2", "mamba2", "no attention",
        {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    ),
    Family(
        "Jamba",
        "jamba",
        "Mamba-1, experts",
        {
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
        refusal="recurrent layers that do not carry a state",
    ),
    Family(
        "Mamba",
        "mamba",
        "Mamba-1, no attention",
        {"state_size": 8, "hidden_act": "silu"},
        refusal="recurrent layers that do not carry a state",
    ),
    Family(
        "RecurrentGemma",
        "recurrent_gemma",
        "state outside the cache",
        {"attention_window_size": 16, "lru_width": 32},
        refusal="computes something else",
    ),
    Family(
        "MiniMax",
        "minimax",
        "a cache of its own",
        {"num_local_experts": 4},
        refusal="uses cache of its own",
    ),
    Family("RWKV", "rwkv", "no attention", refusal="keeps a state"),
    Family("BLOOM", "bloom", "ALiBi", refusal="ALiBi biases"),
)  # fmt: skip
SERVED = tuple(family for family in FAMILIES if family.refusal is None)
HYBRIDS = tuple(
    family
    for family in SERVED
    if any(word in family.trait for word in ("delta", "Mamba", "convolution", "no attention"))
)


def target_of(family: Family) -> PreTrainedModel:
    """A tiny random target."""
    return tiny_target(family.kind, **family.changes)


def prompts() -> list[list[int]]:
    """Four prompts of different lengths, the first a single token, and one as long as another."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()
        for count in (1, 20, 9, 20)
    ]


def own_texts(target: PreTrainedModel, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """What the target writes after each prompt, one by one."""
    return [greedy_text(target, prompt, new_tokens) for prompt in prompts()]


def knowing_drafter(texts: Sequence[Sequence[int]], wrong: Callable[[int], bool]) -> Drafter:
    """A drafter that reads the whole texts, prompts included, from a table.

    Args:
        texts: of all requests.
        wrong: the positions whose drafts it gets wrong.
    """
    drafter = tiny_drafter()
    block = drafter.config.num_draft_tokens

    def drafts_of(anchor: int, position: int) -> list[int]:
        known = [t for t in texts if len(t) > position and t[position] == anchor]
        following = list(known[0][position + 1 : position + 1 + block]) if known else []
        following += [4] * (block - len(following))
        return [
            (token + 1) % VOCABULARY if wrong(position + 1 + offset) else token
            for offset, token in enumerate(following)
        ]

    def draft(anchors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = zip(anchors.tolist(), positions.tolist(), strict=True)
        return torch.tensor([drafts_of(*row) for row in rows])[..., None].float()

    drafter.draft = draft
    drafter.logits = lambda hidden: torch.nn.functional.one_hot(
        hidden[..., 0].long(), VOCABULARY
    ).float()
    return drafter


def written(target: PreTrainedModel, drafter: Drafter | None, batch: int) -> list[list[int]]:
    """What the engine writes after each prompt."""
    engine = Engine(target, drafter, max_batch=batch, max_length=MAX_LENGTH)
    requests = [Request(prompt, NEW_TOKENS, stop_ids=()) for prompt in prompts()]
    return [result.tokens for result in engine.generate(requests)]


def outcome(family: Family) -> dict[str, str]:
    """What the Transformers engine does with a family.

    Returns:
        ``text``: "equal" to the target's own alone, beside others and with drafts; "equal, no
        drafts" where it runs without a drafter alone; "refused"; or "differs". ``message``: of a
        refusal.
    """
    target = target_of(family)
    try:
        alone = written(target, None, 4)
    except DFlashError as error:
        return {"text": "refused", "message": str(error)}
    expected = own_texts(target)
    whole = [prompt + text for prompt, text in zip(prompts(), expected, strict=True)]
    try:
        drafted = [
            written(target, knowing_drafter(whole, lambda position: position % 5 == 0), batch)
            for batch in (1, 4)
        ]
    except DFlashError as error:
        found = "equal, no drafts" if alone == expected else "differs"
        return {"text": found, "message": str(error)}
    return {"text": "equal" if [alone, *drafted] == [expected] * 3 else "differs"}
