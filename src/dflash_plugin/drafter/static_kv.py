"""Static key/value buffers that roll back by forgetting: slot ``j`` holds position ``j``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVShape:
    """Heads and head dimensions of one layer's keys and values."""

    heads: int
    key_dim: int
    value_dim: int


class StaticKV:
    """Keys and values of every layer for ``rows`` requests of up to ``length`` positions.

    A position is overwritten when it is written again, so rejected tokens need no clean-up: a
    request that rolls back writes its next block over them and its mask hides what lies beyond.
    One scratch slot per row, never visible, takes the writes of positions below zero.
    """

    def __init__(
        self,
        layers: list[KVShape],
        rows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.length = length
        self._slots = length + 1
        self.keys = [
            torch.zeros(rows, self._slots, s.heads, s.key_dim, dtype=dtype, device=device)
            for s in layers
        ]
        self.values = [
            torch.zeros(rows, self._slots, s.heads, s.value_dim, dtype=dtype, device=device)
            for s in layers
        ]

    def flat_slots(self, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """Where positions live in the flattened buffers.

        Args:
            positions: int64 [B, T]; below zero means "write to scratch".
            rows: int64 [B], the buffer row of each batch row; None is 0..B-1.

        Returns:
            int64 [B * T].
        """
        if rows is None:
            rows = torch.arange(positions.shape[0], device=positions.device)
        slots = torch.where(positions < 0, self.length, positions)
        return (rows[:, None] * self._slots + slots).reshape(-1)

    def write(self, layer: int, key: Tensor, value: Tensor, flat_slots: Tensor) -> None:
        """Store keys and values [B, T, heads, dim] of one layer at ``flat_slots`` [B * T]."""
        for buffer, new in ((self.keys[layer], key), (self.values[layer], value)):
            buffer.view(-1, *buffer.shape[2:]).index_copy_(
                0, flat_slots, new.reshape(-1, *buffer.shape[2:]).to(buffer.dtype)
            )

    def read(
        self, layer: int, batch: int, length: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as [B, heads, length, dim].

        A view of the first ``batch`` rows, or a gathered copy of the given ``rows`` [B].
        """
        key, value = self.keys[layer][:, :length], self.values[layer][:, :length]
        if rows is None:
            key, value = key[:batch], value[:batch]
        else:
            key, value = key[rows], value[rows]
        return key.transpose(1, 2), value.transpose(1, 2)

    def move_row(self, source: int, destination: int) -> None:
        """Copy one request's keys and values to another row, when a batch is compacted."""
        for buffer in (*self.keys, *self.values):
            buffer[destination].copy_(buffer[source])
