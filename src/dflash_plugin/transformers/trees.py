"""Verify passes over draft trees: what their rows see, and which of them an engine can run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dflash_plugin.decoding.draft_tree import DraftTree
from dflash_plugin.drafter.static_kv import StaticKV
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers.static_cache import TargetPass

TreeRows = int | Literal["auto"]

# Rows beside the chain that the adaptive policy chooses from, and rows of the largest step that it
# tries them in: every size of every batch costs trial steps and graphs.
SIZES, MOST_ROWS = (8, 16, 32), 256


class TreePass(TargetPass):
    """A verify pass over trees: row i is written i slots behind the anchor.

    Args:
        kv: the buffers.
        tree: of each request, R rows.
        lengths: int64 [B], the anchors' positions, and their slots.
        num_keys: slots that the queries look at; covers every row of the pass.
    """

    def __init__(self, kv: StaticKV, tree: DraftTree, lengths: Tensor, num_keys: int) -> None:
        super().__init__(kv, lengths[:, None] + tree.depths, num_keys)
        rows = torch.arange(tree.tokens.shape[1], device=lengths.device)
        self.slots = kv.flat_slots(lengths[:, None] + rows)
        self.tree = tree
        self.lengths = lengths

    def mask(self, window: int | None) -> Tensor:
        """What each row sees bool [B, R, num_keys]: the text before the anchor, and its path."""
        if window not in self._masks:
            batch, rows = self.tree.tokens.shape
            key = torch.arange(self.num_keys, device=self.lengths.device)
            behind = key - self.lengths[:, None]
            row = behind.clamp(0, rows - 1)
            on_path = self.tree.mask.gather(2, row[:, None].expand(batch, rows, -1))
            inside = ((behind >= 0) & (behind < rows))[:, None]
            visible = (behind < 0)[:, None] | (on_path & inside)
            if window is not None:
                position = torch.where(behind < 0, key, self.positions.gather(1, row))
                visible = visible & (self.positions[:, :, None] - position[:, None] < window)
            self._masks[window] = visible
        return self._masks[window]


def move_path(kv: StaticKV, rows: Tensor, lengths: Tensor) -> None:
    """Put the keys and values of accepted rows at their positions, in one copy.

    Args:
        kv: the buffers.
        rows: int64 [B, K + 1], from ``walk``.
        lengths: int64 [B], the anchors' positions in the pass.
    """
    depths = torch.arange(1, rows.shape[1], device=rows.device)
    on_path = rows[:, 1:] >= 0
    start = lengths[:, None]
    kv.move_slots(
        torch.where(on_path, start + rows[:, 1:], -1), torch.where(on_path, start + depths, -1)
    )


def tree_sizes(
    tree_rows: Any, adaptive: bool, has_drafter: bool, max_batch: int, block: int
) -> tuple[int, ...]:
    """Numbers of rows beside the chain that passes can have, rising; none for chains alone.

    Args:
        tree_rows: as given. "auto" leaves it to the adaptive policy, and is none without it.
        adaptive: whether passes are chosen by the clock.
        has_drafter: whether there are drafts.
        max_batch: requests of the largest step.
        block: rows of each without a tree.

    Raises:
        DFlashError: it is not a number of rows, or no drafts come for them.
    """
    is_number = isinstance(tree_rows, int) and not isinstance(tree_rows, bool) and tree_rows >= 0
    if tree_rows != "auto" and not is_number:
        raise DFlashError(
            f"tree_rows is {tree_rows!r}: give 'auto', or a number of rows, 0 for none"
        )
    if tree_rows == 0:
        return ()
    if tree_rows == "auto":
        tried = adaptive and has_drafter
        return tuple(n for n in SIZES if tried and max_batch * (block + n) <= MOST_ROWS)
    if not has_drafter:
        raise DFlashError(f"tree_rows is {tree_rows} but there is no drafter: give one, or 0")
    return (tree_rows,)


def refuse_trees(tree_rows: TreeRows, model_type: str) -> None:
    """Refuse a number of rows for a target with recurrent layers.

    Raises:
        DFlashError: rows are given, and not left to the engine.
    """
    if tree_rows != "auto":
        raise DFlashError(
            f"tree_rows is {tree_rows} but the target {model_type!r} has recurrent layers, whose "
            "state follows one chain of tokens: give 0"
        )
