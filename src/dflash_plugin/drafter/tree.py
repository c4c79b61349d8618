"""A drafter's tree over one block: its drafts, and the best siblings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.decoding.draft_tree import Block, Continuations, DraftTree, grow_tree
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.selector import Proposal
from dflash_plugin.kernels.select_path import candidate_scores

# Of each position; a sibling that is less likely than these is worth no row.
CANDIDATES = 16


def propose_tree(
    drafter: Drafter,
    proposal: Proposal,
    hidden: Tensor,
    anchors: Tensor,
    extra: int,
    temperature: Tensor | None = None,
) -> DraftTree:
    """The drafts as a chain, and ``extra`` tokens beside it.

    A DFlash drafter predicts all positions at once, so that a token's probability does not depend
    on the path to it. A DFlash 2 drafter's selector scores a token by the one before.

    Args:
        drafter: bound to its target.
        proposal: from ``Drafter.propose``.
        hidden: [B, K, hidden], what it was made of.
        anchors: int64 [B].
        extra: tokens beside the chain.
        temperature: float32 [B], what the requests are sampled at; probabilities are taken at it,
            and at 1 for greedy requests and without it.
    """
    scores = proposal.scores.float()
    scale = torch.ones_like(scores[:, 0, 0])
    if temperature is not None:
        scale = torch.where(temperature == 0, scale, temperature)
    scores = scores / scale[:, None, None]
    if proposal.candidates is None:
        top = scores.topk(min(CANDIDATES, scores.shape[-1]), dim=-1)
        log_probs = top.values - scores.logsumexp(dim=-1, keepdim=True)
        block = Block(anchors, proposal.tokens, drafter.token_ids(top.indices), log_probs)
        return grow_tree(block, extra)
    block = Block(anchors, proposal.tokens, proposal.candidates, torch.log_softmax(scores, dim=-1))
    return grow_tree(block, extra, _selected(drafter, proposal.scores, block, hidden, scale))


def _selected(
    drafter: Drafter, scores: Tensor, block: Block, hidden: Tensor, scale: Tensor
) -> Continuations:
    """Continuations by the selector's scores, given the token before."""
    selector = drafter.candidate_selector
    assert selector is not None
    gates = selector.hidden_projection(hidden)
    before = F.embedding(block.candidates, selector.predecessor_codebook)
    rows = F.embedding(block.candidates, selector.successor_codebook)
    # Scores are logits and what the token before adds; that of the chain is known.
    on_chain = torch.cat([block.anchors[:, None], block.chain[:, :-1]], dim=1)
    added = F.embedding(on_chain, selector.predecessor_codebook)
    logits = scores - candidate_scores(torch.zeros_like(scores), gates, added, rows)

    def follow(position: int, places: Tensor) -> Tensor:
        taken = places[..., None].expand(-1, -1, before.shape[-1])
        scores = candidate_scores(
            logits[:, position, None],
            gates[:, position, None],
            before[:, position - 1].gather(1, taken),
            rows[:, position, None],
        )
        return torch.log_softmax(scores / scale[:, None, None], dim=-1)

    return follow
