"""A DFlash 2 drafter's choice of tokens: one path through the likeliest candidates of a block.

All positions are drafted at once, as in DFlash; what the path adds is which tokens go together. The
score of a candidate c after token p at position t is ``logit[t, c] + <A[p] * H(h_t), B[c]>`` with
codebooks A and B and a projection H. Source: ``CandidateSelector`` of PyPI dflash 0.1.0;
https://inco.ai/blog/dflash2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.decoding.confidence import confidence
from dflash_plugin.decoding.sampling import sample
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import LayerFactory


class Proposal(NamedTuple):
    """Drafts of a batch of blocks, and what they were taken from.

    Attributes:
        tokens: int64 [B, K], the target's ids.
        scores: [B, K, C], of the candidates of each position: their logits, or a selector's float32
            scores given the token before.
        probs: float32 [B, K, C], the distribution over the candidates that each token was drawn
            from; None where all are the best of their scores.
        candidates: int64 [B, K, C], the target's ids; None where all of the draft vocabulary are.
    """

    tokens: Tensor
    scores: Tensor
    probs: Tensor | None = None
    candidates: Tensor | None = None

    @property
    def confidence(self) -> Tensor:
        """Log-odds of each position's likeliest token, float32 [B, K], at temperature 1.

        A selector's depend on the drafts before a position, and like all not on its own.
        """
        return confidence(self.scores)


def candidate_scores(logits: Tensor, gates: Tensor, before: Tensor, rows: Tensor) -> Tensor:
    """``logits + <before * gates, rows>``, float32 [..., C].

    Args:
        logits: [..., C], of the candidates, scaled and capped.
        gates: [..., R], the projected hidden states.
        before: [..., R], codebook rows of the tokens before.
        rows: [..., C, R], codebook rows of the candidates.
    """
    context = before.float() * gates.float()
    return logits.float() + torch.einsum("...r,...cr->...c", context, rows.float())


def select_path(
    candidates: Tensor,
    logits: Tensor,
    gates: Tensor,
    anchors: Tensor,
    predecessors: Tensor,
    successors: Tensor,
    temperature: Tensor | None = None,
    u: Tensor | None = None,
) -> Proposal:
    """Walk each block from its anchor, taking or drawing one candidate a position.

    Scores and probabilities are float32. Drawing is by inverse CDF in the candidates' order.

    Args:
        candidates: int64 [B, K, C], different token ids of a position.
        logits: [B, K, C], of the candidates, scaled and capped.
        gates: [B, K, R], the projected hidden states.
        anchors: int64 [B], the tokens before the first position.
        predecessors: [V, R], a row for each token that may come before.
        successors: [V, R], a row for each candidate.
        temperature: float32 [B], rows at 0 take the best; None takes it everywhere.
        u: [B, K] in [0, 1), the noise of draws; goes with ``temperature``.
    """
    rows = successors[candidates].float()
    previous = anchors
    tokens: list[Tensor] = []
    scores: list[Tensor] = []
    probs: list[Tensor] = []
    for place in range(candidates.shape[1]):
        scores.append(
            candidate_scores(
                logits[:, place], gates[:, place], predecessors[previous], rows[:, place]
            )
        )
        if temperature is None or u is None:
            chosen = scores[-1].argmax(dim=-1)
        else:
            probs.append(_distribution(scores[-1], temperature))
            chosen = sample(probs[-1], u[:, place])
        previous = candidates[:, place].gather(-1, chosen[:, None])[:, 0]
        tokens.append(previous)
    drawn_from = torch.stack(probs, dim=1) if probs else None
    return Proposal(torch.stack(tokens, dim=1), torch.stack(scores, dim=1), drawn_from, candidates)


def _distribution(scores: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities [B, C] of scores [B, C]; all on the best where the temperature [B] is 0."""
    is_greedy = (temperature == 0)[:, None]
    best = torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    drawn = torch.softmax(scores / torch.where(is_greedy, 1.0, temperature[:, None]), dim=-1)
    return torch.where(is_greedy, best, drawn)


class CandidateSelector(nn.Module):
    """Codebooks and projection, and the walk with them."""

    def __init__(self, config: DrafterConfig, host: LayerFactory) -> None:
        super().__init__()
        assert config.selector is not None
        rank = config.selector.rank
        self.top_k = config.selector.top_k
        self.predecessor_codebook = nn.Parameter(torch.zeros(config.vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(config.vocab_size, rank))
        self.hidden_projection = host.replicated_linear(
            config.hidden_size, rank, bias=False, name="candidate_selector.hidden_projection"
        )

    def scores(self, candidates: Tensor, logits: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
        """Scores of candidates where the tokens before are known, float32 [..., C].

        Args:
            candidates: int64 [..., C].
            logits: [..., C].
            hidden: [..., hidden], of the rows that predict.
            before: int64 [...].
        """
        return candidate_scores(
            logits,
            self.hidden_projection(hidden),
            F.embedding(before, self.predecessor_codebook),
            F.embedding(candidates, self.successor_codebook),
        )

    def forward(
        self,
        candidates: Tensor,
        logits: Tensor,
        hidden: Tensor,
        anchors: Tensor,
        temperature: Tensor | None = None,
        u: Tensor | None = None,
    ) -> Proposal:
        """``select_path`` for hidden states [B, K, hidden] of the rows that predict."""
        gates = self.hidden_projection(hidden)
        return self.path(candidates, logits, gates, anchors, temperature, u)

    def path(
        self,
        candidates: Tensor,
        logits: Tensor,
        gates: Tensor,
        anchors: Tensor,
        temperature: Tensor | None = None,
        u: Tensor | None = None,
    ) -> Proposal:
        """``select_path`` with the own codebooks, where ``hidden_projection`` is done."""
        return select_path(
            candidates,
            logits,
            gates,
            anchors,
            self.predecessor_codebook,
            self.successor_codebook,
            temperature,
            u,
        )
