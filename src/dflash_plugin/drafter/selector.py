"""A DFlash 2 drafter's choice of tokens: one path through the likeliest candidates of a block.

All positions are drafted at once, as in DFlash; the path adds which tokens go together. The score
of a candidate c after token p at position t is ``logit[t, c] + <A[p] * H(h_t), B[c]>`` with
codebooks A and B and a projection H. Source: ``CandidateSelector`` of PyPI dflash 0.1.0;
https://inco.ai/blog/dflash2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import LayerFactory
from dflash_plugin.kernels.reference import confidence
from dflash_plugin.kernels.select_path import Limits, candidate_scores, select_path_naive


class Proposal(NamedTuple):
    """Drafts of a batch of blocks, and what they were taken from.

    Attributes:
        tokens: int64 [B, K], the target's ids.
        scores: [B, K, C], of each position's candidates: their logits, or a selector's float32
            scores given the token before.
        probs: float32 [B, K, C], the distribution over the candidates that each token was drawn
            from; None where all are the best of their scores.
        candidates: int64 [B, K, C], the target's ids; None where all of the draft vocabulary are.
        own_probs: float32 [B, K, C], the drafter's distribution at the requests' sampling, where
            ``probs`` may be a sharper one; else None.
    """

    tokens: Tensor
    scores: Tensor
    probs: Tensor | None = None
    candidates: Tensor | None = None
    own_probs: Tensor | None = None

    @property
    def confidence(self) -> Tensor:
        """Log-odds of each position's likeliest token, float32 [B, K], at temperature 1.

        A selector's depend on the drafts before a position, and like all not on its own.
        """
        return confidence(self.scores)


class CandidateSelector(nn.Module):
    """Codebooks and projection, and the selection of a path with them."""

    def __init__(self, config: DrafterConfig, factory: LayerFactory) -> None:
        super().__init__()
        assert config.selector is not None
        rank = config.selector.rank
        self.top_k = config.selector.top_k
        self.predecessor_codebook = nn.Parameter(torch.zeros(config.vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(config.vocab_size, rank))
        self.hidden_projection = factory.replicated_linear(
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
        limits: Limits | None = None,
    ) -> Proposal:
        """``select_path_naive`` for hidden states [B, K, hidden] of the rows that predict."""
        gates = self.hidden_projection(hidden)
        return self.path(candidates, logits, gates, anchors, temperature, u, limits)

    def path(
        self,
        candidates: Tensor,
        logits: Tensor,
        gates: Tensor,
        anchors: Tensor,
        temperature: Tensor | None = None,
        u: Tensor | None = None,
        limits: Limits | None = None,
    ) -> Proposal:
        """``select_path_naive`` with the own codebooks, where ``hidden_projection`` is done."""
        path = select_path_naive(
            candidates,
            logits,
            gates,
            anchors,
            self.predecessor_codebook,
            self.successor_codebook,
            temperature,
            u,
            limits,
        )
        return Proposal(path.tokens, path.scores, path.probs, candidates)
