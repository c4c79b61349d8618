"""What an engine supplies to the drafter: layers, attention and the context store.

An engine adapter implements ``LayerFactory`` with its own linears and ``ContextStore`` with its own
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from dflash_plugin.drafter.config import DrafterConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, query, key, value)`` for one block, all [B, T, heads, head_dim] like the result.

``key`` and ``value`` are the block's own; the context's are wherever ``inject`` put them.
"""


class ContextStore(Protocol):
    """Where context keys and values live: a static buffer or an engine's paged cache."""

    def write(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Store context [B, T, kv_heads, head_dim] at positions [B, T]; below zero is dropped."""

    def block(self, anchors: Tensor, block_size: int) -> Attend:
        """Attention for blocks that start at positions ``anchors`` [B]."""


class QKVLinear(Protocol):
    """Merged projection of queries, keys and values."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., (heads + 2 * kv_heads) * head_dim], of one shard."""

    def keys_values(self, x: Tensor) -> Tensor:
        """[..., in] to [..., 2 * kv_heads * head_dim]: keys, then values."""


class LayerFactory(Protocol):
    """Supplies the modules that an engine has its own versions of.

    ``shards`` is the tensor-parallel degree: head counts and inner widths are divided by it.
    Linears take [..., in] and return [..., out / shards] (column) or [..., out] (row, reduced).
    ``name`` is the module's name in a checkpoint.
    """

    shards: int

    def qkv_linear(self, config: DrafterConfig, name: str) -> nn.Module:
        """A ``QKVLinear``; key/value heads are repeated where there are fewer than shards."""

    def column_linear(
        self, in_features: int, out_features: Sequence[int], bias: bool, name: str
    ) -> nn.Module:
        """Merged column-parallel linear; its result concatenates the parts."""

    def row_linear(self, in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
        """Row-parallel linear."""

    def replicated_linear(
        self, in_features: int, out_features: int, bias: bool, name: str
    ) -> nn.Module:
        """Linear that every shard holds whole."""

    def head(self, rows: int, hidden_size: int, name: str) -> nn.Module:
        """Output head [rows, hidden_size] without a bias."""
