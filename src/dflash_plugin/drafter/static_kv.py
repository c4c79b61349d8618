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
    One scratch slot per row, never visible, takes the writes of positions below zero. The rows of a
    draft tree stand behind the anchor's slot, side by side, until ``move_slots`` puts those that
    were accepted at their positions.
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
        shapes = [(s.heads, s.key_dim) for s in layers] + [(s.heads, s.value_dim) for s in layers]
        # Buffers of one shape lie in one tensor, so that one launch can move slots of them all.
        self._stacks = {
            shape: torch.zeros(
                shapes.count(shape), rows, self._slots, *shape, dtype=dtype, device=device
            )
            for shape in dict.fromkeys(shapes)
        }
        parts = {shape: iter(stack) for shape, stack in self._stacks.items()}
        buffers = [next(parts[shape]) for shape in shapes]
        self.keys, self.values = buffers[: len(layers)], buffers[len(layers) :]

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

    @torch.no_grad()
    def write(self, layer: int, key: Tensor, value: Tensor, flat_slots: Tensor) -> None:
        """Store keys and values [B, T, heads, dim] of one layer at ``flat_slots`` [B * T].

        Gradients end here.
        """
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

    @torch.no_grad()
    def move_slots(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy keys and values of all layers to other slots of their rows.

        Args:
            sources: int64 [B, T], slots of rows 0..B-1; below zero is scratch.
            destinations: int64 [B, T]; below zero drops the copy.
        """
        taken, written = self.flat_slots(sources), self.flat_slots(destinations)
        for stack in self._stacks.values():
            slots = stack.flatten(1, 2)
            slots.index_copy_(1, written, slots.index_select(1, taken))

    @torch.no_grad()
    def move_row(self, source: int, destination: int) -> None:
        """Copy one request's keys and values to another row, when a batch is compacted."""
        for stack in self._stacks.values():
            stack[:, destination].copy_(stack[:, source])
