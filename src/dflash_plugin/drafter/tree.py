"""A drafter's tree over one block: its likeliest chain and the best siblings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.decoding.draft_tree import Block, Continuations, DraftTree, grow_tree
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.selector import CandidateSelector
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
    scale = scale[:, None, None]
    selector = drafter.candidate_selector
    if selector is not None:
        best = logits.topk(selector.top_k, dim=-1)
        path = selector(best.indices, best.values, hidden, anchors)
        is_chain = best.indices == path.tokens[..., None]
        log_probs = torch.log_softmax(path.scores / scale, dim=-1)
        block = Block(anchors, best.indices, is_chain.long().argmax(dim=-1), log_probs)
        return grow_tree(block, extra, _selected(selector, hidden, best, scale))
    scaled = logits / scale
    top = scaled.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
    block = Block(
        anchors,
        drafter.token_ids(top.indices),
        # The first one, as drafts without a tree are chosen.
        (top.indices == logits.argmax(dim=-1, keepdim=True)).long().argmax(dim=-1),
        top.values - scaled.logsumexp(dim=-1, keepdim=True),
    )
    return grow_tree(block, extra)


def _selected(
    selector: CandidateSelector, hidden: Tensor, best: torch.return_types.topk, scale: Tensor
) -> Continuations:
    """Continuations by the selector's scores, given the token before."""
    gates = selector.hidden_projection(hidden)
    before = F.embedding(best.indices, selector.predecessor_codebook)
    rows = F.embedding(best.indices, selector.successor_codebook)

    def follow(position: int, places: Tensor) -> Tensor:
        taken = places[..., None].expand(-1, -1, before.shape[-1])
        scores = candidate_scores(
            best.values[:, position, None],
            gates[:, position, None],
            before[:, position - 1].gather(1, taken),
            rows[:, position, None],
        )
        return torch.log_softmax(scores / scale, dim=-1)

    return follow
