"""The modules of a draft layer, and the plain torch linears they use without an engine.

Arithmetic follows ``DFlashDraftModel`` and ``DFlash2DraftModel`` of PyPI dflash 0.1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.convolution import DynamicConvolution
from dflash_plugin.drafter.gate import AttentionGate
from dflash_plugin.drafter.interfaces import Attend, LayerFactory, QKVLinear
from dflash_plugin.drafter.latent_attention import LatentAttention
from dflash_plugin.drafter.rope import RotaryEmbedding


class TorchQKV(nn.Linear):
    """``QKVLinear`` on one device."""

    def __init__(self, config: DrafterConfig) -> None:
        self.query_width = config.num_attention_heads * config.head_dim
        width = self.query_width + 2 * config.num_key_value_heads * config.head_dim
        super().__init__(config.hidden_size, width, bias=config.attention_bias)

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys and values alone."""
        bias = None if self.bias is None else self.bias[self.query_width :]
        return F.linear(x, self.weight[self.query_width :], bias)


class TorchLayers:
    """Plain torch linears on one device."""

    shards = 1

    def qkv_linear(self, config: DrafterConfig, name: str) -> nn.Module:
        """One linear over queries, keys and values."""
        return TorchQKV(config)

    def column_linear(
        self, in_features: int, out_features: Sequence[int], bias: bool, name: str
    ) -> nn.Module:
        """One linear over the concatenated parts."""
        return nn.Linear(in_features, sum(out_features), bias=bias)

    def row_linear(self, in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
        """A plain linear."""
        return nn.Linear(in_features, out_features, bias=bias)

    def replicated_linear(
        self, in_features: int, out_features: int, bias: bool, name: str
    ) -> nn.Module:
        """A plain linear."""
        return nn.Linear(in_features, out_features, bias=bias)

    def head(self, rows: int, hidden_size: int, name: str) -> nn.Module:
        """A plain linear."""
        return nn.Linear(hidden_size, rows, bias=False)


class RMSNorm(nn.Module):
    """Root-mean-square norm; "gemma" style multiplies by 1 + weight."""

    def __init__(self, dim: int, eps: float, gemma: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if gemma else torch.ones(dim))
        self.eps = eps
        self.gemma = gemma

    @property
    def scale(self) -> Tensor:
        """What normalized values [dim] are multiplied by."""
        return 1.0 + self.weight if self.gemma else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.scale.to(x.dtype), self.eps)


class DraftAttention(nn.Module):
    """Projections, norms and rotation of one layer; attention itself is the engine's."""

    def __init__(self, config: DrafterConfig, index: int, factory: LayerFactory) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // factory.shards
        self.kv_heads = max(1, config.num_key_value_heads // factory.shards)
        self.value_scale = config.attention_value_scale
        name = f"layers.{index}.self_attn"
        self.qkv_proj = factory.qkv_linear(config, f"{name}.qkv_proj")
        self.output_proj = factory.row_linear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            config.attention_output_bias,
            f"{name}.o_proj",
        )
        gemma = config.norm_style == "gemma"
        eps = config.rms_norm_eps
        self.query_norm = RMSNorm(self.head_dim, eps, gemma) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, eps, gemma) if config.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.attention_sinks else None
        self.gate = AttentionGate(config, factory, name) if config.attention_gate else None

    def context(
        self, x: Tensor, rotary: RotaryEmbedding, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of context rows x [..., hidden], each [..., kv_heads, head_dim]."""
        kv = cast(QKVLinear, self.qkv_proj).keys_values(x)
        return self._finish(kv, rotary, tables)

    def _finish(
        self, kv: Tensor, rotary: RotaryEmbedding, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Normed, rotated keys and scaled values of projections [..., 2 * kv_heads * dim]."""
        key, value = kv.unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(-3)
        key = rotary.rotate(self.key_norm(key), tables)
        return key, value if self.value_scale is None else value * self.value_scale

    def forward(
        self,
        x: Tensor,
        rotary: RotaryEmbedding,
        tables: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> Tensor:
        """Attention of block rows x [B, T, hidden] over the context and each other."""
        width = self.heads * self.head_dim
        query, kv = self.qkv_proj(x).split([width, 2 * self.kv_heads * self.head_dim], dim=-1)
        query = query.unflatten(-1, (self.heads, self.head_dim))
        query = rotary.rotate(self.query_norm(query), tables)
        key, value = self._finish(kv, rotary, tables)
        return self.finish(attend(self.index, query, key, value), x)

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Gate and output projection.

        Args:
            attended: [..., heads, head_dim].
            x: [..., hidden], the attention's input, which a gate reads.
        """
        if self.gate is not None:
            attended = self.gate(attended, x)
        out: Tensor = self.output_proj(attended.flatten(-2))
        return out


class DraftMLP(nn.Module):
    """Gated MLP."""

    def __init__(self, config: DrafterConfig, index: int, factory: LayerFactory) -> None:
        super().__init__()
        name, inner = f"layers.{index}.mlp", config.intermediate_size
        self.gate_up_proj = factory.column_linear(
            config.hidden_size, [inner, inner], config.mlp_bias, f"{name}.gate_up_proj"
        )
        self.down_proj = factory.row_linear(
            inner, config.hidden_size, config.mlp_bias, f"{name}.down_proj"
        )
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``down(act(gate(x)) * up(x))``."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate) * up)
        return out


class DraftLayer(nn.Module):
    """Pre-norm attention and MLP with residuals, each within a convolution in DFlash 2."""

    attention: DraftAttention | LatentAttention
    attention_conv: DynamicConvolution | None
    mlp_conv: DynamicConvolution | None

    def __init__(self, config: DrafterConfig, index: int, factory: LayerFactory) -> None:
        super().__init__()
        gemma = config.norm_style == "gemma"
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, gemma)
        kind = DraftAttention if config.latent_attention is None else LatentAttention
        self.attention = kind(config, index, factory)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, gemma)
        self.mlp = DraftMLP(config, index, factory)
        self.attention_conv = self.mlp_conv = None
        if config.convolution is not None:
            name = f"layers.{index}"
            self.attention_conv = DynamicConvolution(config, factory, f"{name}.attention_conv")
            self.mlp_conv = DynamicConvolution(config, factory, f"{name}.mlp_conv")

    def forward(
        self,
        x: Tensor,
        rotary: RotaryEmbedding,
        tables: tuple[Tensor, Tensor],
        attend: Attend,
        block_size: int | Tensor,
    ) -> Tensor:
        """One layer over block rows [..., T, hidden]."""

        def attention(rows: Tensor) -> Tensor:
            return cast(Tensor, self.attention(rows, rotary, tables, attend))

        x = x + _within(self.attention_conv, self.attention_norm(x), attention, block_size)
        return x + _within(self.mlp_conv, self.mlp_norm(x), self.mlp, block_size)


def _within(
    convolution: DynamicConvolution | None,
    x: Tensor,
    sublayer: Callable[[Tensor], Tensor],
    block_size: int | Tensor,
) -> Tensor:
    return sublayer(x) if convolution is None else convolution(x, sublayer, block_size)
