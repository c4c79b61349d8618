"""Lossless verification of a draft tree: walk from the anchor to the child that holds the token.

At each node the target's own token is taken, its argmax or a draw, and the walk goes on where a
child holds it. What is committed is therefore what the target alone would write, for any tree that
was settled before the draw; the tree decides only how far a pass gets. The draws at one depth share
their noise: a walk makes one of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.decoding.draft_tree import DraftTree
from dflash_plugin.decoding.verify import Verdict
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream, uniforms


class TreeVerdict(NamedTuple):
    """What a verify pass over a tree commits.

    Attributes:
        verdict: as of a chain.
        rows: int64 [B, K + 1], the row of the tree at each depth of the walk, the anchor's first;
            -1 behind the last.
    """

    verdict: Verdict
    rows: Tensor


def walk(tree: DraftTree, following: Tensor, num_drafts: int) -> TreeVerdict:
    """Walk down the tree while a child holds the target's token.

    Args:
        tree: R rows; no two children of a row hold the same token.
        following: int64 [B, R], the target's token after each row.
        num_drafts: depth of the tree, K.
    """
    agree = tree.tokens == following.gather(1, tree.parents)
    agree[:, 0] = True
    reached = (agree[:, None] | ~tree.mask).all(dim=-1)
    index = torch.arange(tree.tokens.shape[1], device=following.device).expand_as(tree.tokens)
    # Rows that are not reached go to a column of their own.
    columns = torch.where(reached, tree.depths, num_drafts + 1)
    rows = index.new_full((len(index), num_drafts + 2), -1).scatter(1, columns, index)
    rows = rows[:, : num_drafts + 1]
    accepted = (rows >= 0).sum(dim=1) - 1
    last = rows.gather(1, accepted[:, None])
    next_token = following.gather(1, last)
    # The token after each row of the walk is what the next row holds, or the bonus token.
    tokens = torch.where(rows >= 0, following.gather(1, rows.clamp(min=0)), -1)
    return TreeVerdict(Verdict(accepted, next_token[:, 0], tokens), rows)


def verify_tree_greedy(tree: DraftTree, logits: Tensor, num_drafts: int) -> TreeVerdict:
    """``walk`` along the target's likeliest tokens; logits [B, R, V]."""
    return walk(tree, logits.argmax(dim=-1), num_drafts)


def verify_tree_sampled(
    tree: DraftTree, target_probs: Tensor, seed: Tensor, positions: Tensor, num_drafts: int
) -> TreeVerdict:
    """``walk`` along draws from the target.

    The noise of a draw is keyed by the position of its token alone. A request with a seed writes
    the text that the target alone would write with it.

    Args:
        tree: chosen before anything is drawn.
        target_probs: [B, R, V], after each row.
        seed: int64 [B], of the requests.
        positions: int64 [B], the anchors' positions.
        num_drafts: depth of the tree, K.
    """
    u = uniforms(seed, positions[:, None] + tree.depths + 1, Stream.NEXT)
    return walk(tree, sample(target_probs, u), num_drafts)
