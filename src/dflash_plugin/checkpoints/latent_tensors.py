"""The tensors of a draft layer with latent attention (MLA)."""

from __future__ import annotations

from dflash_plugin.drafter.config import DrafterConfig, LatentAttentionConfig


def latent_tensors(
    config: DrafterConfig, sizes: LatentAttentionConfig
) -> dict[str, tuple[int, ...]]:
    """Names behind ``self_attn.`` and shapes, as in DeepSeek's checkpoints.

    Source: SpecForge, pull request 758, biases included; tensor list of ``lightseekorg/
    kimi-k3-dflash2``.

    Args:
        config: of the drafter.
        sizes: its ``latent_attention``.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = heads * sizes.qk_head_dim
    linears: dict[str, tuple[int, int, bool]] = {
        "kv_a_proj_with_mqa": (
            sizes.kv_lora_rank + sizes.qk_rope_head_dim,
            hidden,
            config.attention_bias,
        ),
        "kv_b_proj": (
            heads * (sizes.qk_nope_head_dim + sizes.v_head_dim),
            sizes.kv_lora_rank,
            False,
        ),
        "o_proj": (hidden, heads * sizes.v_head_dim, config.attention_output_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"kv_a_layernorm.weight": (sizes.kv_lora_rank,)}
    if sizes.q_lora_rank is None:
        linears["q_proj"] = (queries, hidden, False)
    else:
        linears["q_a_proj"] = (sizes.q_lora_rank, hidden, config.attention_bias)
        linears["q_b_proj"] = (queries, sizes.q_lora_rank, False)
        shapes["q_a_layernorm.weight"] = (sizes.q_lora_rank,)
    for name, (rows, columns, bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes
