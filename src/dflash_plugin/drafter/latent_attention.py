"""Multi-head latent attention (MLA) of a draft layer, in its expanded form.

``kv_a_proj_with_mqa`` makes a latent and one rotated part of the keys that all heads share;
``kv_b_proj`` expands the normed latent to the rest of each head's keys and to its values. Queries
may come from a latent of their own. KV injection sends context rows through the projections that
block rows take. Keys and values are stored expanded and equally wide, so any attention with as many
key/value heads as query heads serves them.

Source: ``Qwen3DFlashMLAAttention`` of SpecForge (pull request 758), which agrees with what
TorchSpec, the trainer of the public Kimi drafters, has in ``models/draft/deepseek_eagle.py``. vLLM
0.33 and SGLang 0.5.23 have no such drafter of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import Attend, LayerFactory
from dflash_plugin.drafter.rope import RotaryEmbedding


class LatentAttention(nn.Module):
    """Projections, norms and rotation of one layer; attention itself is the engine's.

    A bias, where there is one, is that of the projections into latents and of the output.
    """

    def __init__(self, config: DrafterConfig, index: int, factory: LayerFactory) -> None:
        super().__init__()
        assert config.latent_attention is not None
        self.sizes = sizes = config.latent_attention
        self.index = index
        self.head_dim = config.head_dim
        self.heads = self.kv_heads = config.num_attention_heads // factory.shards
        self.sinks = None
        hidden, heads = config.hidden_size, config.num_attention_heads
        eps, bias = config.rms_norm_eps, config.attention_bias
        name = f"layers.{index}.self_attn"
        queries = [heads * sizes.qk_head_dim]
        if sizes.q_lora_rank is None:
            self.q_proj = factory.column_linear(hidden, queries, False, f"{name}.q_proj")
        else:
            rank = sizes.q_lora_rank
            self.q_a_proj = factory.replicated_linear(hidden, rank, bias, f"{name}.q_a_proj")
            self.q_a_layernorm = nn.RMSNorm(rank, eps)
            self.q_b_proj = factory.column_linear(rank, queries, False, f"{name}.q_b_proj")
        self.kv_a_proj_with_mqa = factory.replicated_linear(
            hidden,
            sizes.kv_lora_rank + sizes.qk_rope_head_dim,
            bias,
            f"{name}.kv_a_proj_with_mqa",
        )
        self.kv_a_layernorm = nn.RMSNorm(sizes.kv_lora_rank, eps)
        self.kv_b_proj = factory.column_linear(
            sizes.kv_lora_rank,
            [heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)],
            False,
            f"{name}.kv_b_proj",
        )
        self.output_proj = factory.row_linear(
            heads * sizes.v_head_dim, hidden, config.attention_output_bias, f"{name}.o_proj"
        )

    def context(
        self, x: Tensor, rotary: RotaryEmbedding, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of context rows x [..., hidden], each [..., heads, head_dim]."""
        sizes = self.sizes
        latent, shared = self.kv_a_proj_with_mqa(x).split(
            [sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1
        )
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1))
        own, value = expanded.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
        shared = rotary.rotate(shared.unsqueeze(-2), tables)
        key = torch.cat([own, shared.expand(*own.shape[:-1], -1)], dim=-1)
        return self._padded(key), self._padded(value)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryEmbedding,
        tables: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> Tensor:
        """Attention of block rows x [B, T, hidden] over the context and each other."""
        sizes = self.sizes
        own, turned = (
            self._queries(x)
            .unflatten(-1, (self.heads, -1))
            .split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        )
        query = torch.cat([own, rotary.rotate(turned, tables)], dim=-1)
        key, value = self.context(x, rotary, tables)
        attended = attend(self.index, self._padded(query), key, value)
        out: Tensor = self.output_proj(attended[..., : sizes.v_head_dim].flatten(-2))
        return out

    def _queries(self, x: Tensor) -> Tensor:
        if self.sizes.q_lora_rank is None:
            queries: Tensor = self.q_proj(x)
        else:
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return queries

    def _padded(self, x: Tensor) -> Tensor:
        """Zeros behind [..., heads, dim] up to ``head_dim``; they change no product."""
        return F.pad(x, (0, self.head_dim - x.shape[-1]))
