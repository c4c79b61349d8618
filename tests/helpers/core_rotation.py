"""Heads that the core's attention has normed and rotated, to hold kernels' twins against."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dflash_plugin.drafter.config import RopeConfig
from dflash_plugin.drafter.layers import DraftAttention, TorchLayers
from dflash_plugin.drafter.rope import RotaryEmbedding
from dflash_plugin.kernels.common import NormRope
from tests.helpers.kernel_helpers import DEVICE, positions_of, random
from tests.helpers.tiny import tiny_config

# The core rounds cosines, sines and products too.
CORE_BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8192}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gemma": {"norm_style": "gemma", "attention_value_scale": 0.7},
    "interleaved": {"qk_norm": False, "rope": RopeConfig(interleaved=True)},
    "partial": {"rope": RopeConfig(partial_rotary_factor=0.5)},
    "yarn": {"rope": RopeConfig(type="yarn", parameters=YARN, interleaved=True)},
}
IDS, CHANGES = list(KINDS), list(KINDS.values())


class Rotated(NamedTuple):
    """17 rows of 9 query heads and 3 key heads, each of 24 values.

    Attributes:
        qkv: [17, 15 * 24], before norm and rotation.
        positions: int64 [17].
        weights: of the norms of queries and keys, None without norms.
        how: norm and rotation.
        value_scale: of the configuration.
        query: [17, 9, 24], normed and rotated.
        key: [17, 3, 24], normed and rotated.
        value: [17, 3, 24], scaled.
    """

    qkv: Tensor
    positions: Tensor
    weights: tuple[Tensor, Tensor] | None
    how: NormRope
    value_scale: float | None
    query: Tensor
    key: Tensor
    value: Tensor


def rotated_by_the_core(changes: dict[str, Any], dtype: torch.dtype) -> Rotated:
    """Random rows through a ``DraftAttention`` of a tiny configuration with ``changes``."""
    config = tiny_config(num_attention_heads=9, num_key_value_heads=3, head_dim=24, **changes)
    attention = DraftAttention(config, 0, TorchLayers()).to(dtype)
    rotary = RotaryEmbedding(config).to(DEVICE)
    weights = None
    if config.qk_norm:
        with torch.no_grad():
            attention.query_norm.weight.add_(0.2 * random(24).to(dtype))
            attention.key_norm.weight.add_(0.3 * random(24).to(dtype))
        weights = attention.query_norm.weight.detach(), attention.key_norm.weight.detach()
    how = NormRope(
        rotary.inverse_frequencies,
        config.rms_norm_eps,
        gemma=config.norm_style == "gemma",
        interleaved=rotary.interleaved,
        factor=rotary.factor,
    )
    positions, qkv = positions_of(17), random(17, 15 * 24, dtype=dtype)
    tables = rotary.tables(positions, dtype)
    query, kv = qkv.split([9 * 24, 6 * 24], dim=-1)
    with torch.no_grad():
        query = rotary.rotate(attention.query_norm(query.unflatten(-1, (9, 24))), tables)
        key, value = attention._finish(kv, rotary, tables)
    scale = config.attention_value_scale
    return Rotated(qkv, positions, weights, how, scale, query, key, value)
