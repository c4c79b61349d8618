"""Torch functions that several twins share: drawing a token, and a drafter's confidence."""

from __future__ import annotations

import torch
from torch import Tensor

# Confidences beyond these limits say nothing more.
MIN_CONFIDENCE, MAX_CONFIDENCE = -8.0, 12.0


def sample(probs: Tensor, u: Tensor) -> Tensor:
    """Draw by inverse CDF; a token of probability zero is never drawn.

    Args:
        probs: [..., V], not necessarily normalized, at least one entry above zero.
        u: [...] in [0, 1).

    Returns:
        int64 [...].
    """
    cumulative = probs.double().cumsum(dim=-1)
    threshold = u.double()[..., None] * cumulative[..., -1:]
    drawn = (cumulative <= threshold).sum(dim=-1)
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(drawn, last)


def confidence(logits: Tensor) -> Tensor:
    """Log-odds of the likeliest token, float32 [...], of logits [..., V]."""
    logits = logits.float()
    top = logits.max(dim=-1)
    rest = logits.scatter(-1, top.indices[..., None], float("-inf")).logsumexp(dim=-1)
    return (top.values - rest).clamp(MIN_CONFIDENCE, MAX_CONFIDENCE)
