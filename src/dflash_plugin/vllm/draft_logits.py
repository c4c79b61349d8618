"""What a selector's drafts were drawn from, as vLLM's rejection sampler reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Proposals:
    """The drafts' distributions of all requests that there may be.

    vLLM takes the softmax of logits over the temperature: so they are the scores of the candidates
    after the draft before, and -inf of every other token.

    Args:
        shape: requests, drafts and vocabulary.
        top_k: C, candidates of a draft.
        device: where drafts are made.

    Attributes:
        logits: float32 [R, K, V].
    """

    def __init__(self, shape: Sequence[int], top_k: int, device: torch.device) -> None:
        requests, drafts, vocabulary = shape
        # Padding of a captured pass writes to a request that there is not.
        whole = (requests + 1, drafts, vocabulary)
        self._logits = torch.full(whole, float("-inf"), dtype=torch.float32, device=device)
        self._written = torch.zeros(requests + 1, drafts, top_k, dtype=torch.int64, device=device)
        self.logits = self._logits[:requests]

    def write(self, tokens: Tensor, scores: Tensor, slots: Tensor, places: Tensor) -> None:
        """Put a pass's candidates in the place of those of the last one.

        Args:
            tokens: int64 [T, C].
            scores: float32 [T, C].
            slots: int64 [T], of the rows' requests; below zero for padding.
            places: int [T], of the drafts in their blocks.
        """
        requests = torch.where(slots < 0, len(self.logits), slots)[:, None]
        places = places.long()[:, None]
        self._logits[requests, places, self._written[requests, places].squeeze(1)] = float("-inf")
        self._logits[requests, places, tokens] = scores
        self._written[requests, places] = tokens[:, None]
