"""One pass over static key/value buffers: its cache, its masks, and the attention over them.

Two public seams of Transformers carry it: a ``Cache`` whose ``update`` writes into ``StaticKV``,
and an attention function that takes its mask from the pass at hand. Both work for any decoder-only
model that hands its keyword arguments down to its attention, as Transformers' models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.drafter.static_kv import StaticKV

# Transformers takes any name with "flash" in it for a Flash Attention kernel.
ATTENTION = "static_kv"


class TargetPass:
    """One forward pass: which rows and positions it writes, and what its queries see.

    Args:
        kv: the buffers.
        positions: int64 [B, T]; rows below zero are padding and go to scratch.
        num_keys: slots that the queries look at; covers every position of the pass.
        rows: int64 [B], buffer row of each batch row, or None for 0..B-1.
        is_start: the requests begin here: recurrent layers start without a state.
    """

    def __init__(
        self,
        kv: StaticKV,
        positions: Tensor,
        num_keys: int,
        rows: Tensor | None = None,
        is_start: bool = False,
    ) -> None:
        self.kv = kv
        self.is_start = is_start
        self.rows = rows
        self.num_keys = num_keys
        self.batch = positions.shape[0]
        self.slots = kv.flat_slots(positions, rows)
        self.positions = positions.clamp(min=0)
        self.windows: dict[int, int | None] = {}
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """Causal visibility bool [B, T, num_keys], within ``window`` positions if given."""
        if window not in self._masks:
            query = self.positions[:, :, None]
            key = torch.arange(self.num_keys, device=query.device)
            visible = key <= query
            if window is not None:
                visible = visible & (query - key < window)
            self._masks[window] = visible
        return self._masks[window]


class StaticCache(Cache):  # type: ignore[misc] # Transformers has no stubs
    """Cache over ``StaticKV``: stores a pass's keys and values and returns all that it may see.

    Args:
        target_pass: the pass.
        layers: Transformers' own cache layers, of which the recurrent ones hold states; none where
            the model has no recurrent layer.
    """

    def __init__(self, target_pass: TargetPass, layers: Sequence[Any] = ()) -> None:
        super().__init__(layers=list(layers))
        self.target_pass = target_pass

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values [B, heads, T, dim]; those that it may see."""
        step = self.target_pass
        step.kv.write(
            layer_idx, key_states.transpose(1, 2), value_states.transpose(1, 2), step.slots
        )
        return step.kv.read(layer_idx, step.batch, step.num_keys, step.rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions come with the pass."""
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[Any, int]:
        """Of a mask that nobody reads: the attention takes it from the pass."""
        return query_length, 0


def _static_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    target_pass: TargetPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if target_pass is None and softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scale,
            sliding_window=sliding_window,
            **kwargs,
        )
        return out, None
    if target_pass is None:
        mask = _visible(attention_mask, query, key)
    else:
        target_pass.windows[int(getattr(module, "layer_idx", -1))] = sliding_window
        mask = target_pass.mask(sliding_window)
    out = masked_attention(query, key, value, mask, scale, s_aux, softcap)
    return out.transpose(1, 2).contiguous(), None


def _visible(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """bool [B, T, L] of a pass outside the engine, where None means a causal mask."""
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if attention_mask is not None:
        visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        return visible[:, 0].expand(batch, -1, -1)
    slots = torch.arange(keys, device=query.device)
    return (slots <= slots[keys - rows :, None]).expand(batch, -1, -1)


AttentionInterface.register(ATTENTION, _static_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
