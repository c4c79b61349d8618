"""Position weights for a block's cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_GAMMA = {8: 4.0, 10: 5.0, 16: 7.0}


def gamma_for(block_size: int) -> float:
    """Decay length for a block size; 4, 5, 7 for 8, 10, 16 (arXiv 2602.06036, section 4.2)."""
    return DEFAULT_GAMMA.get(block_size, max(1.0, (block_size - 1) * 0.5))


def exponential_weights(num_drafts: int, gamma: float, device: torch.device) -> Tensor:
    """``exp(-(k - 1) / gamma)`` for k = 1..num_drafts, float32 [K]."""
    return torch.exp(-torch.arange(num_drafts, device=device) / gamma)


def dpace_weights(cross_entropy: Tensor, valid: Tensor, alpha: float) -> Tensor:
    """Weights from the expected accepted length (D-PACE, arXiv 2605.18810).

    With q the drafter's probability of the right token and ``s = (1 - alpha) q + alpha``, position
    k weighs the sum over j >= k of the product of s up to j: how much of the expected length
    passes through k. Computed without gradient.

    Args:
        cross_entropy: [..., K], per position.
        valid: bool [..., K].
        alpha: smoothing in [0, 1].

    Returns:
        float32 [..., K], zero where not valid.
    """
    with torch.no_grad():
        confidence = torch.exp(-cross_entropy.float())
        smooth = torch.where(valid, (1 - alpha) * confidence + alpha, 1.0)
        reach = smooth.cumprod(dim=-1) * valid
        return reach.flip(-1).cumsum(dim=-1).flip(-1) * valid
