"""The drafter's block pass with fused kernels: ``Drafter.run_block``, which is its naive twin."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers.activations import SiLUActivation

from dflash_plugin.drafter import (
    Attend,
    DraftAttention,
    Drafter,
    DraftLayer,
    DraftMLP,
    RMSNorm,
)
from dflash_plugin.fp8 import RoundedRows, takes_rounded
from dflash_plugin.kernels.add_rms_norm import add_rms_norm
from dflash_plugin.kernels.gated_act import gated_act
from dflash_plugin.kernels.qk_norm_rope import qk_norm_rope


def run_block(drafter: Drafter, embedded: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Hidden states [T, hidden] of block rows, normed.

    What goes into a linear with an FP8 weight is rounded where it is made.

    Args:
        drafter: its linears may be an engine's.
        embedded: [T, hidden].
        positions: int64 [T].
        attend: attention over the context and each row's own block.
    """
    hidden, residual = embedded, None
    for module in drafter.layers:
        layer = cast(DraftLayer, module)
        rounds = takes_rounded(layer.attention.qkv_proj)
        rows, residual = _norm(layer.attention_norm, hidden, residual, rounds)
        hidden = _attention(drafter, layer.attention, rows, positions, attend)
        rounds = takes_rounded(layer.mlp.gate_up_proj)
        rows, residual = _norm(layer.mlp_norm, hidden, residual, rounds)
        hidden = _mlp(layer.mlp, rows)
    return cast(Tensor, _norm(drafter.norm, hidden, residual, rounds=False)[0])


def fuse(drafter: Drafter, features: Tensor, rounds: bool) -> Tensor | RoundedRows:
    """Context rows [T, hidden], as ``Drafter.fuse`` makes them.

    Args:
        drafter: its linears may be an engine's.
        features: [T, n * target_hidden].
        rounds: give FP8 rows.
    """
    rows = drafter.fc(features.to(drafter.norm.weight.dtype))
    return _norm(drafter.context_norm, rows, None, rounds)[0]


def _norm(
    norm: RMSNorm, x: Tensor, residual: Tensor | None, rounds: bool
) -> tuple[Tensor | RoundedRows, Tensor]:
    return add_rms_norm(x, residual, norm.weight, norm.eps, norm.gemma, rounds)


def _attention(
    drafter: Drafter,
    attention: DraftAttention,
    x: Tensor | RoundedRows,
    positions: Tensor,
    attend: Attend,
) -> Tensor:
    config, rotary = drafter.config, drafter.rotary
    heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.head_dim
    qkv = attention.qkv_proj(x)
    normed = config.qk_norm
    qk_norm_rope(
        qkv,
        positions,
        cast(Tensor, attention.query_norm.weight) if normed else None,
        cast(Tensor, attention.key_norm.weight) if normed else None,
        rotary.inverse_frequencies,
        heads,
        kv_heads,
        dim,
        config.rms_norm_eps,
        gemma=config.norm_style == "gemma",
        interleaved=rotary.interleaved,
        factor=rotary.factor,
        value_scale=attention.value_scale,
    )
    query, key, value = (
        part.unflatten(-1, (-1, dim))
        for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    )
    out: Tensor = attention.output_proj(attend(attention.index, query, key, value).flatten(-2))
    return out


def _mlp(mlp: DraftMLP, x: Tensor | RoundedRows) -> Tensor:
    gate_up = mlp.gate_up_proj(x)
    if isinstance(mlp.activation, SiLUActivation):
        inner = gated_act(gate_up, takes_rounded(mlp.down_proj))
    else:
        gate, up = gate_up.chunk(2, dim=-1)
        inner = mlp.activation(gate) * up
    out: Tensor = mlp.down_proj(inner)
    return out
