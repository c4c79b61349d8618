"""How sure a drafter is of each draft position."""

from __future__ import annotations

from torch import Tensor

# Confidences outside this range say nothing more.
MIN_CONFIDENCE, MAX_CONFIDENCE = -8.0, 12.0


def confidence(logits: Tensor) -> Tensor:
    """Log-odds of the likeliest token, float32 [...], of logits [..., V]."""
    logits = logits.float()
    top = logits.max(dim=-1)
    rest = logits.scatter(-1, top.indices[..., None], float("-inf")).logsumexp(dim=-1)
    return (top.values - rest).clamp(MIN_CONFIDENCE, MAX_CONFIDENCE)
