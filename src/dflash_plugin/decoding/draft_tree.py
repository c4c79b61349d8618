"""A draft tree: the likeliest chain of a block, and siblings where they are worth most.

A prefix of a block weighs the product of its tokens' probabilities, by the drafter: the chance that
verification reaches it. Beside the whole chain the tree holds the ``extra`` prefixes that weigh
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

# Log-probabilities are taken between these: a child must weigh less than its parent after rounding,
# or it could be chosen without it.
LEAST_LOG_PROB, MOST_LOG_PROB = -50.0, -1e-4

# Continuations of frontier nodes: the depth that they are at, counted from 0, and the nodes' tokens
# int64 [B, M] give tokens int64 [B, M, C], different ones for a node, and log-probabilities float32
# [B, M, C].
Continuations = Callable[[int, Tensor], tuple[Tensor, Tensor]]


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


def grow_tree(anchors: Tensor, num_drafts: int, extra: int, follow: Continuations) -> DraftTree:
    """The likeliest chain, and the ``extra`` prefixes beside it that weigh most.

    The chain takes the likeliest token at each step. Each depth keeps its ``extra`` best prefixes:
    no more can be among the best of all, and none of those continues a prefix that was dropped.

    Args:
        anchors: int64 [B].
        num_drafts: depth of the tree, K.
        extra: rows beside the chain.
        follow: the tokens that may follow.
    """
    batch = anchors.shape[0]
    # Place 0 of the frontier is the chain's node.
    tokens = anchors[:, None].expand(-1, extra + 1)
    weights = torch.full((batch, extra + 1), float("-inf"), device=anchors.device)
    weights[:, 0] = 0.0
    chain, found, worth, parent_codes = [anchors[:, None]], [], [], []
    for depth in range(num_drafts):
        next_tokens, log_probs = follow(depth, tokens)
        width = next_tokens.shape[-1]
        grown = weights[..., None] + log_probs.clamp(LEAST_LOG_PROB, MOST_LOG_PROB)
        best = log_probs[:, :1].argmax(dim=-1)
        chain_weight = grown[:, 0].gather(1, best)
        grown = grown.flatten(1).scatter(1, best, float("-inf"))
        kept = grown.topk(extra, dim=1)
        flat = next_tokens.flatten(1)
        chain.append(flat.gather(1, best))
        found.append(flat.gather(1, kept.indices))
        worth.append(kept.values)
        place = kept.indices // width
        # Up to K a row of the chain, beyond it a prefix that the depth before has kept.
        beside = num_drafts + (depth - 1) * extra + place
        parent_codes.append(torch.where(place == 0, depth, beside))
        tokens = torch.cat([chain[-1], found[-1]], dim=1)
        weights = torch.cat([chain_weight, kept.values], dim=1)
    return _chosen(chain, found, worth, parent_codes, extra)


def _chosen(
    chain: list[Tensor],
    found: list[Tensor],
    worth: list[Tensor],
    parent_codes: list[Tensor],
    extra: int,
) -> DraftTree:
    """The tree of the best prefixes of all depths."""
    num_drafts, anchors = len(found), chain[0]
    best = torch.cat(worth, dim=1).topk(extra, dim=1)
    exists = best.values > float("-inf")
    order = torch.arange(extra, device=anchors.device).expand_as(best.indices)
    rank = torch.zeros_like(torch.cat(found, dim=1)).scatter(1, best.indices, order)
    codes = torch.cat(parent_codes, dim=1).gather(1, best.indices)
    beside = num_drafts + 1 + rank.gather(1, (codes - num_drafts - 1).clamp(min=0))
    parents = torch.where(codes <= num_drafts, codes, beside)
    steps = torch.arange(num_drafts + 1, device=anchors.device).expand(len(anchors), -1)
    tokens = torch.cat(found, dim=1).gather(1, best.indices)
    all_parents = torch.cat([(steps - 1).clamp(min=0), torch.where(exists, parents, 0)], dim=1)
    depths = torch.where(exists, best.indices // max(extra, 1) + 1, 1)
    return DraftTree(
        torch.cat([*chain, torch.where(exists, tokens, -1)], dim=1),
        all_parents,
        torch.cat([steps, depths], dim=1),
        ancestors(all_parents, num_drafts),
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


def of_marginals(tokens: Tensor, log_probs: Tensor) -> Continuations:
    """Continuations where a position's probabilities do not depend on the tokens before it.

    Args:
        tokens: int64 [B, K, C], each position's candidates.
        log_probs: float32 [B, K, C].
    """

    def follow(depth: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, nodes.shape[1], -1)
        return tokens[:, depth, None].expand(shape), log_probs[:, depth, None].expand(shape)

    return follow
