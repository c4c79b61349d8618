"""The drafter's block pass with fused kernels: ``Drafter.run_block`` is its naive twin."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.activations import SiLUActivation

from dflash_plugin.drafter.convolution import DynamicConvolution
from dflash_plugin.drafter.interfaces import Attend
from dflash_plugin.drafter.layers import DraftAttention, DraftLayer, DraftMLP, RMSNorm
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.kernels.add_rms_norm import Convolution, add_rms_norm
from dflash_plugin.kernels.common import NormRope
from dflash_plugin.kernels.fp8_rows import RoundedRows, takes_rounded
from dflash_plugin.kernels.gated_act import gated_act
from dflash_plugin.kernels.grouped_convolution import grouped_convolution
from dflash_plugin.kernels.projected_convolution import projected_convolution, projects
from dflash_plugin.kernels.qk_norm_rope import qk_norm_rope


def run_block(
    drafter: Drafter,
    embedded: Tensor,
    positions: Tensor,
    attend: Attend,
    block_size: int | None = None,
) -> Tensor:
    """Hidden states [T, hidden] of block rows, normed.

    What goes into a linear with an FP8 weight is rounded where it is made.

    Args:
        drafter: its linears may be an engine's; no layer has latent attention.
        embedded: [T, hidden], blocks one after the other.
        positions: int64 [T].
        attend: attention over the context and each row's own block.
        block_size: rows of a block, where they are not the configuration's.
    """
    size = block_size or drafter.config.block_size
    hidden, residual, after = embedded, None, None
    for module in drafter.layers:
        layer = cast(DraftLayer, module)
        attention = cast(DraftAttention, layer.attention)
        rows, residual, after = _enter(
            layer.attention_norm, layer.attention_conv, attention.qkv_proj,
            hidden, residual, after, size, attention.gate,
        )  # fmt: skip
        hidden = _attention(drafter, attention, rows, positions, attend)
        rows, residual, after = _enter(
            layer.mlp_norm, layer.mlp_conv, layer.mlp.gate_up_proj, hidden, residual, after, size
        )
        hidden = _mlp(layer.mlp, rows)
    return cast(Tensor, _norm(drafter.norm, hidden, residual, rounds=False, after=after)[0])


def _enter(
    norm: RMSNorm,
    convolution: DynamicConvolution | None,
    linear: nn.Module,
    hidden: Tensor,
    residual: Tensor | None,
    after: Convolution | None,
    block_size: int,
    gate: nn.Module | None = None,
) -> tuple[Tensor | RoundedRows, Tensor, Convolution | None]:
    """What a sublayer's first linear takes, the residual, and what its result is convolved with.

    ``after`` is what the last sublayer's result ``hidden`` is convolved with. A ``gate`` reads the
    same rows as the linear, not rounded.
    """
    rounds = takes_rounded(linear) and gate is None
    if convolution is None:
        return *_norm(norm, hidden, residual, rounds, after), None
    rows, residual = _norm(norm, hidden, residual, rounds=False, after=after)
    assert isinstance(rows, Tensor)
    bases = convolution.base_kernel
    weight = getattr(convolution.kernel_projection, "weight", None)
    if projects(weight, rows):
        convolved, dynamic = projected_convolution(rows, weight, bases[0], block_size, rounds)
    else:
        before, dynamic = convolution.kernels(rows)
        convolved = grouped_convolution(rows, before, bases[0], block_size, rounds)
    return convolved, residual, Convolution(dynamic, bases[1], block_size)


def fuse(drafter: Drafter, features: Tensor, rounds: bool) -> Tensor | RoundedRows:
    """Context rows [T, hidden], as ``Drafter.fuse`` makes them.

    Args:
        drafter: its linears may be an engine's.
        features: [T, n * target_hidden].
        rounds: give FP8 rows.
    """
    rows = drafter.fc(drafter.taps(features))
    return _norm(drafter.context_norm, rows, None, rounds)[0]


def norm_rope(drafter: Drafter) -> NormRope:
    """How a drafter norms and rotates the heads of queries and keys."""
    config, rotary = drafter.config, drafter.rotary
    return NormRope(
        rotary.inverse_frequencies,
        config.rms_norm_eps,
        gemma=config.norm_style == "gemma",
        interleaved=rotary.interleaved,
        factor=rotary.factor,
    )


def _norm(
    norm: RMSNorm,
    x: Tensor,
    residual: Tensor | None,
    rounds: bool,
    after: Convolution | None = None,
) -> tuple[Tensor | RoundedRows, Tensor]:
    return add_rms_norm(x, residual, norm.weight, norm.eps, norm.gemma, rounds, after)


def _attention(
    drafter: Drafter,
    attention: DraftAttention,
    x: Tensor | RoundedRows,
    positions: Tensor,
    attend: Attend,
) -> Tensor:
    heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.head_dim
    qkv = attention.qkv_proj(x)
    weights = None
    if drafter.config.qk_norm:
        norms = attention.query_norm, attention.key_norm
        weights = cast("tuple[Tensor, Tensor]", tuple(norm.weight for norm in norms))
    qk_norm_rope(
        qkv,
        positions,
        weights,
        norm_rope(drafter),
        heads,
        kv_heads,
        value_scale=attention.value_scale,
    )
    query, key, value = (
        part.unflatten(-1, (-1, dim))
        for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    )
    # Rows are rounded only where there is no gate to read them.
    return attention.finish(attend(attention.index, query, key, value), cast(Tensor, x))


def _mlp(mlp: DraftMLP, x: Tensor | RoundedRows) -> Tensor:
    gate_up = mlp.gate_up_proj(x)
    if isinstance(mlp.activation, SiLUActivation):
        inner = gated_act(gate_up, takes_rounded(mlp.down_proj))
    else:
        gate, up = gate_up.chunk(2, dim=-1)
        inner = mlp.activation(gate) * up
    out: Tensor = mlp.down_proj(inner)
    return out
