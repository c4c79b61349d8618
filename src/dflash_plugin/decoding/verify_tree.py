"""Lossless verification of a draft tree: walk from the anchor to the child that holds the token.

At each node the target's own token is taken, and the walk goes on where a child holds it. Greedy,
that token is the argmax, and what is committed is what the target alone would write.

Sampled, the chain is verified as without a tree. Its accepted drafts and the token behind them
follow the target's distribution. If a child holds that token, the walk goes on from there with
draws from the target. So it commits what a chain commits, and sometimes more. This is exact for any
tree whose rows beside the chain were settled before the noise of verification was read.
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


def verify_tree_sampled(
    tree: DraftTree, chain: Verdict, target_probs: Tensor, seed: Tensor, positions: Tensor
) -> TreeVerdict:
    """``walk`` along what verification of the chain commits, and along draws behind it.

    The draws of one depth share their noise, keyed by the position of their token: a walk makes one
    of them, and the chain's verdict ends with one.

    Args:
        tree: R rows.
        chain: of ``verify`` for the tree's first K + 1 rows.
        target_probs: [B, R, V], after each row.
        seed: int64 [B], of the requests.
        positions: int64 [B], the anchors' positions.
    """
    u = uniforms(seed, positions[:, None] + tree.depths + 1, Stream.NEXT)
    drawn = sample(target_probs, u)
    rows = chain.tokens.shape[1]
    settled = torch.where(chain.tokens >= 0, chain.tokens, drawn[:, :rows])
    return walk(tree, torch.cat([settled, drawn[:, rows:]], dim=1), rows - 1)
