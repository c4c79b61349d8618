"""Rotary position embedding with Transformers' frequency scalings, NeoX or interleaved."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError, reason


def frequencies(config: DrafterConfig) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [rotary_dim / 2] on the CPU, and the factor on cos and sin.

    The scaling rules (yarn, llama3, linear, ...) are Transformers'.
    """
    with torch.device("cpu"):
        return _frequencies(config)


def _frequencies(config: DrafterConfig) -> tuple[Tensor, float]:
    rope = config.rope
    holder = Qwen3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.rope_head_dim,
        max_position_embeddings=rope.max_position_embeddings,
        rope_parameters={
            "rope_type": rope.type,
            "rope_theta": rope.theta,
            "partial_rotary_factor": rope.partial_rotary_factor,
            **rope.parameters,
        },
    )
    if rope.type == "default":
        rotary_dim = int(config.rope_head_dim * rope.partial_rotary_factor)
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        return 1.0 / rope.theta**exponents, 1.0
    inverse, factor = ROPE_INIT_FUNCTIONS[rope.type](holder, torch.device("cpu"))
    return inverse.float(), float(factor)


def check_rotation(config: DrafterConfig) -> None:
    """Refuse rotation settings from which no frequencies follow.

    Raises:
        DFlashError: names them.
    """
    try:
        inverse, factor = frequencies(config)
        numbers = [*inverse.tolist(), factor, config.attention_scale]
        wrong = "" if all(map(math.isfinite, numbers)) else "they give no finite frequencies"
    except Exception as error:  # Transformers raises many kinds here
        wrong = reason(error)
    if wrong:
        raise DFlashError(
            f"rope_parameters {config.rope.parameters} do not fit rope type {config.rope.type!r} "
            f"({wrong}): correct them"
        )


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions."""

    inverse_frequencies: Tensor

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        inverse, self.factor = frequencies(config)
        self.interleaved = config.rope.interleaved
        self.register_buffer("inverse_frequencies", inverse, persistent=False)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [..., 1, rotary_dim / 2] of positions int64 [...], in ``dtype``."""
        angles = positions[..., None, None].float() * self.inverse_frequencies
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the leading ``rotary_dim`` of x [..., heads, head_dim]."""
        cos, sin = tables[0].to(x.dtype), tables[1].to(x.dtype)
        rotary_dim = 2 * cos.shape[-1]
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        halves = (first * cos - second * sin, second * cos + first * sin)
        if self.interleaved:
            turned = torch.stack(halves, dim=-1).flatten(-2)
        else:
            turned = torch.cat(halves, dim=-1)
        return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)
