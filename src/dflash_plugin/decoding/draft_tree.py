"""A draft tree: the chain of a block, and siblings where they are worth most.

A prefix of a block weighs the product of its tokens' probabilities, by the drafter: the chance that
verification reaches it. A token of the chain counts as the likeliest one at its position, which it
is unless it was drawn. Beside the whole chain the tree holds the ``extra`` prefixes that weigh
most. A prefix never weighs more than the one that it continues, so these are a tree with the chain.
Source: best-first trees over a block's marginals, "DDTree" (arXiv 2604.12989) and "CaDDTree" (arXiv
2606.01813).

Everything runs on the device without a host wait and with fixed shapes, so it fits in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Log-probabilities are taken between these: a child must weigh less than its parent after rounding,
# or it could be chosen without it.
LEAST_LOG_PROB, MOST_LOG_PROB = -50.0, -1e-4


class DraftTree(NamedTuple):
    """Rows of a verify pass: the anchor, K tokens of the chain, then the extra ones by weight.

    A parent stands before its children, so the first rows, from the chain on, are a tree, too.

    Attributes:
        tokens: int64 [B, R], R = 1 + K + extra; -1 in a row that there was no prefix for.
        parents: int64 [B, R], the row that each one follows; 0 for the anchor itself.
        depths: int64 [B, R], tokens from the anchor.
        mask: bool [B, R, R], True where the second row is the first one or leads to it.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    mask: Tensor

    def first(self, rows: int) -> DraftTree:
        """The tree of the first rows."""
        return DraftTree(
            self.tokens[:, :rows],
            self.parents[:, :rows],
            self.depths[:, :rows],
            self.mask[:, :rows, :rows],
        )


class Block(NamedTuple):
    """What a drafter says of one block.

    Attributes:
        anchors: int64 [B].
        chain: int64 [B, K], the drafts.
        candidates: int64 [B, K, C], tokens of each position, the likeliest among them.
        log_probs: float32 [B, K, C], of the candidates behind the chain's tokens.
    """

    anchors: Tensor
    chain: Tensor
    candidates: Tensor
    log_probs: Tensor


# Log-probabilities of a position's candidates, float32 [B, N or 1, C], behind candidates of the
# position before it, int64 [B, N] of C.
Continuations = Callable[[int, Tensor], Tensor]


def grow_tree(block: Block, extra: int, follow: Continuations | None = None) -> DraftTree:
    """The chain, and the ``extra`` prefixes beside it that weigh most.

    Each position keeps its ``extra`` best prefixes: no more can be among the best of all, and none
    of those continues a prefix that was dropped.

    Args:
        block: K positions.
        extra: rows beside the chain.
        follow: probabilities beside the chain; None where they do not depend on the token before.
    """
    count, width = block.candidates.shape[1:]
    log_probs = block.log_probs.clamp(LEAST_LOG_PROB, MOST_LOG_PROB)
    of_chain = log_probs.amax(dim=-1, keepdim=True)
    before = of_chain.cumsum(dim=1) - of_chain
    is_chain = block.candidates == block.chain[..., None]
    siblings = (before + log_probs).masked_fill(is_chain, float("-inf"))
    pool = F.pad(siblings[:, 0], (0, max(0, extra - width)), value=float("-inf"))
    kept = pool.topk(extra, dim=1)
    weights, indices = [kept.values], [kept.indices]
    for position in range(1, count):
        if follow is None:
            next_log_probs = log_probs[:, position, None]
        else:
            next_log_probs = follow(position, indices[-1] % width)
            next_log_probs = next_log_probs.clamp(LEAST_LOG_PROB, MOST_LOG_PROB)
        grown = (weights[-1][..., None] + next_log_probs).flatten(1)
        # Candidates behind the chain come first, then those behind each prefix that was kept.
        kept = torch.cat([siblings[:, position], grown], dim=1).topk(extra, dim=1)
        weights.append(kept.values)
        indices.append(kept.indices)
    return _chosen(block, torch.cat(weights, dim=1), torch.cat(indices, dim=1), extra)


def _chosen(block: Block, weights: Tensor, indices: Tensor, extra: int) -> DraftTree:
    """The tree of the best prefixes of all positions, from those of each: both [B, K * extra]."""
    batch, count, width = block.candidates.shape
    best = weights.topk(extra, dim=1)
    exists = best.values > float("-inf")
    order = torch.arange(extra, device=weights.device).expand_as(best.indices)
    rank = torch.zeros_like(indices).scatter(1, best.indices, order)
    position, index = best.indices // max(extra, 1), indices.gather(1, best.indices)
    behind = index // width
    # 0 is the chain, then come the prefixes that the position before has kept.
    beside = rank.gather(1, ((position - 1) * extra + behind - 1).clamp(min=0))
    parents = torch.where(behind == 0, position, count + 1 + beside)
    tokens = block.candidates.flatten(1).gather(1, position * width + index % width)
    steps = torch.arange(count + 1, device=weights.device).expand(batch, -1)
    parents = torch.cat([(steps - 1).clamp(min=0), torch.where(exists, parents, 0)], dim=1)
    return DraftTree(
        torch.cat([block.anchors[:, None], block.chain, torch.where(exists, tokens, -1)], dim=1),
        parents,
        torch.cat([steps, torch.where(exists, position + 1, 1)], dim=1),
        ancestors(parents, count),
    )


def ancestors(parents: Tensor, depth: int) -> Tensor:
    """Which rows lead to each row, itself among them: bool [B, R, R].

    Args:
        parents: int64 [B, R]; the root is its own.
        depth: of the deepest row at most.
    """
    batch, rows = parents.shape
    mask = torch.eye(rows, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
    jump = parents
    # Each turn doubles how far back a row sees.
    for _ in range(depth.bit_length()):
        mask = mask | mask.gather(1, jump[..., None].expand(-1, -1, rows))
        jump = jump.gather(1, jump)
    return mask
