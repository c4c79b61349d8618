"""A drafter's tree over one block: its likeliest chain and the best siblings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.decoding.draft_tree import Continuations, DraftTree, grow_tree, of_marginals
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.kernels.select_path import candidate_scores

# Of each position; a sibling that is less likely than these is worth no row.
CANDIDATES = 16


def propose_tree(
    drafter: Drafter,
    hidden: Tensor,
    anchors: Tensor,
    extra: int,
    temperature: Tensor | None = None,
) -> DraftTree:
    """Choose the chain and ``extra`` tokens beside it.

    A DFlash drafter predicts all positions at once, so that a token's probability does not depend
    on the path to it. A DFlash 2 drafter's selector scores a token by the one before.

    Args:
        drafter: bound to its target.
        hidden: [B, K, hidden], from ``Drafter.draft``.
        anchors: int64 [B].
        extra: tokens beside the chain.
        temperature: float32 [B], what the requests are sampled at; probabilities are taken at it,
            and at 1 for greedy requests and without it.
    """
    logits = drafter.logits(hidden).float()
    scale = torch.ones_like(logits[:, 0, 0])
    if temperature is not None:
        scale = torch.where(temperature == 0, scale, temperature)
    selector = drafter.candidate_selector
    count = CANDIDATES if selector is None else selector.top_k
    best = logits.topk(min(count, logits.shape[-1]), dim=-1)
    if selector is not None:
        follow = _selected(drafter, hidden, best.indices, best.values, scale)
    else:
        scaled = logits / scale[:, None, None]
        log_probs = scaled.gather(-1, best.indices) - scaled.logsumexp(dim=-1, keepdim=True)
        follow = of_marginals(drafter.token_ids(best.indices), log_probs)
    return grow_tree(anchors, hidden.shape[1], extra, follow)


def _selected(
    drafter: Drafter, hidden: Tensor, candidates: Tensor, logits: Tensor, scale: Tensor
) -> Continuations:
    """Continuations by the selector's scores, given the token of each node."""
    selector = drafter.candidate_selector
    assert selector is not None
    gates = selector.hidden_projection(hidden)
    rows = F.embedding(candidates, selector.successor_codebook)

    def follow(depth: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        scores = candidate_scores(
            logits[:, depth, None],
            gates[:, depth, None],
            F.embedding(nodes, selector.predecessor_codebook),
            rows[:, depth, None],
        )
        log_probs = torch.log_softmax(scores / scale[:, None, None], dim=-1)
        return candidates[:, depth, None].expand_as(scores), log_probs

    return follow
