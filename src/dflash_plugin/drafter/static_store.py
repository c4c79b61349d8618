"""The drafter's context keys and values in a ``StaticKV``."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.drafter.interfaces import Attend
from dflash_plugin.drafter.masks import dense_block_mask
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.static_kv import KVShape, StaticKV


class StaticStore:
    """Context store in plain torch: row ``b`` of a batch is row ``rows[b]`` here.

    The caller sets ``rows`` and ``num_keys`` before it injects or drafts; ``rows`` None
    means 0..B-1.
    """

    def __init__(
        self, drafter: Drafter, rows: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        config = drafter.config
        shape = KVShape(config.num_key_value_heads, config.head_dim, config.head_dim)
        self.kv = StaticKV([shape] * len(config.layers), rows, length, dtype, device)
        self.drafter = drafter
        self.rows: Tensor | None = None
        self.num_keys = length

    def write(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Store context keys and values [B, T, heads, dim] at positions [B, T]."""
        self.kv.write(layer, key, value, self.kv.flat_slots(positions, self.rows))

    def block(self, anchors: Tensor, block_size: int) -> Attend:
        """Attention for blocks at ``anchors`` [B], whose rows are stored after the context.

        The next injection overwrites them, so no other block sees them.
        """
        config = self.drafter.config
        positions = anchors[:, None] + torch.arange(block_size, device=anchors.device)
        slots = self.kv.flat_slots(positions, self.rows)
        kinds = {
            layer: dense_block_mask(layer, config.window_from, anchors, block_size, self.num_keys)
            for layer in set(config.layers)
        }

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.kv.write(index, key, value, slots)
            keys, values = self.kv.read(index, anchors.shape[0], self.num_keys, self.rows)
            out = masked_attention(
                query.transpose(1, 2),
                keys,
                values,
                kinds[config.layers[index]],
                config.attention_scale,
                self.drafter.sinks(index),
            )
            return out.transpose(1, 2)

        return attend
