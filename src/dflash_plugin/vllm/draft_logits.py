"""Distributions of a selector's drafts, in the form that vLLM's rejection sampler reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DraftLogits:
    """Logits of the drafts of all request slots.

    vLLM divides the logits by the temperature and takes the softmax. They hold the candidates'
    scores, given the draft before, and -inf for every other token.

    Args:
        shape: R request slots, K drafts and V tokens of the vocabulary.
        top_k: C, candidates of a draft.
        device: where drafts are made.

    Attributes:
        logits: float32 [R, K, V].
    """

    def __init__(self, shape: Sequence[int], top_k: int, device: torch.device) -> None:
        requests, drafts, vocabulary = shape
        # Padding of a captured pass writes to one more slot, which no request has.
        padded = (requests + 1, drafts, vocabulary)
        self._logits = torch.full(padded, float("-inf"), dtype=torch.float32, device=device)
        self._written = torch.zeros(requests + 1, drafts, top_k, dtype=torch.int64, device=device)
        self.logits = self._logits[:requests]

    def write(self, tokens: Tensor, scores: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Replace the candidates of the last pass by those of this one.

        Args:
            tokens: int64 [T, C].
            scores: float32 [T, C].
            slots: int64 [T], request slots of the rows; below zero for padding.
            positions: int [T], positions of the drafts in their blocks, from 0.
        """
        requests = torch.where(slots < 0, len(self.logits), slots)[:, None]
        drafts = positions.long()[:, None]
        self._logits[requests, drafts, self._written[requests, drafts].squeeze(1)] = float("-inf")
        self._logits[requests, drafts, tokens] = scores
        self._written[requests, drafts] = tokens[:, None]
