"""From a drafter's confidence to the probability that a draft stands, learnt while serving.

A position's confidence is the log-odds of its likeliest token, a function of the drafter's
distribution and not of the token that was drawn from it. That is all the model may look at: whether
a drawn token is verified must not depend on the token itself, or those that are verified would no
longer be distributed as drawn, and rejection sampling (arXiv 2211.17192) would give another
distribution than the target's. Outcomes of earlier passes lie before every draw, so that the model
may learn from them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Confidences beyond say nothing more.
LEAST, MOST = -8.0, 12.0
# A confidence that counted against its token would be noise.
LEAST_SLOPE = 0.05
# While serving, one of so many passes teaches: a launch takes its time, outcomes are many.
LEARNING = 4


def confidence(logits: Tensor) -> Tensor:
    """Log-odds of the likeliest token, float32 [...], of logits [..., V]."""
    logits = logits.float()
    top = logits.max(dim=-1)
    rest = logits.scatter(-1, top.indices[..., None], float("-inf")).logsumexp(dim=-1)
    return (top.values - rest).clamp(LEAST, MOST)


class Calibration(NamedTuple):
    """A logistic model for each draft position k: logit p = slope_k * confidence + offset_k.

    Attributes:
        weights: float32 [K, 2], slope and offset.
        precision: float32 [K, 2, 2], how sure the weights are: what the outcomes so far have told,
            fading, and the prior.
    """

    weights: Tensor
    precision: Tensor


class AcceptanceModel:
    """Bayesian online logistic regression, one Newton step a pass; all on the device, no host wait.

    Before any outcome a draft is taken to stand as often as the drafter believes in it.

    Args:
        num_drafts: K.
        device: of the state.
        prior: precision of the first belief: of its slope, and four times that of its offset.
        memory: how many passes' outcomes count; older ones fade.
    """

    def __init__(
        self,
        num_drafts: int,
        device: torch.device | str = "cpu",
        *,
        prior: float = 4.0,
        memory: float = 2000.0,
    ) -> None:
        start = torch.tensor([1.0, 0.0], device=device)
        # A slope is worth more than an offset, since confidences spread wider than one.
        self.prior_precision = prior, 0.25 * prior
        self.prior = torch.diag(torch.tensor(self.prior_precision, device=device))
        self.fade = 1.0 - 1.0 / memory
        self.state = Calibration(
            start.repeat(num_drafts, 1), self.prior.repeat(num_drafts, 1, 1).clone()
        )

    def probabilities(self, confidences: Tensor) -> Tensor:
        """That a draft stands if those before it do, float32 [B, K], of confidences [B, K]."""
        slope, offset = self.state.weights.unbind(dim=-1)
        return torch.sigmoid(slope * confidences.clamp(LEAST, MOST) + offset)

    def survival(self, confidences: Tensor) -> Tensor:
        """That a draft and all before it stand, float32 [B, K]; never rising along K."""
        return self.probabilities(confidences).cumprod(dim=-1)

    def observe(self, confidences: Tensor, accepted: Tensor, verified: Tensor) -> None:
        """Learn from a pass.

        Args:
            confidences: [B, K], of its drafts.
            accepted: int64 [B], drafts that stood.
            verified: int64 [B], drafts that were verified; 0 teaches nothing.
        """
        place = torch.arange(confidences.shape[1], device=confidences.device)
        # The first that fell was judged, those behind it were not.
        judged = (place <= accepted[:, None]) & (place < verified[:, None])
        stood = place < accepted[:, None]
        x = (
            torch.stack([confidences.clamp(LEAST, MOST), torch.ones_like(confidences)], dim=-1)
            * judged[..., None]
        )
        p = self.probabilities(confidences)
        gradient = ((stood.float() - p)[..., None] * x).sum(dim=0)
        curvature = torch.einsum("bk,bki,bkj->kij", p * (1 - p), x, x)
        weights, precision = self.state
        precision = self.prior + self.fade * (precision - self.prior) + curvature
        weights = weights + _solve(precision, gradient)
        slope = weights[:, :1].clamp(min=LEAST_SLOPE)
        self.state = Calibration(torch.cat([slope, weights[:, 1:]], dim=-1), precision)


def _solve(matrices: Tensor, right: Tensor) -> Tensor:
    """Solutions [K, 2] of K pairs of equations, which a library would check on the host."""
    (a, b), (c, d) = (row.unbind(dim=-1) for row in matrices.unbind(dim=-2))
    x, y = right.unbind(dim=-1)
    return torch.stack([d * x - b * y, a * y - c * x], dim=-1) / (a * d - b * c)[..., None]


def calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> float:
    """Expected calibration error: how far shares lie from probabilities [N], outcomes bool [N]."""
    if probabilities.numel() == 0:
        return 0.0
    index = (probabilities * bins).long().clamp(max=bins - 1)
    said = torch.bincount(index, weights=probabilities.double(), minlength=bins)
    came = torch.bincount(index, weights=outcomes.double(), minlength=bins)
    return float((said - came).abs().sum() / probabilities.numel())
