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

from dflash_plugin.decoding.confidence import MAX_CONFIDENCE, MIN_CONFIDENCE

# A confidence that counted against its token would be noise.
MIN_SLOPE = 0.05
# While serving, one of so many passes teaches: a launch takes its time, outcomes are many.
LEARNING = 4


class Calibration(NamedTuple):
    """A logistic model for each draft position k: logit p = slope_k * confidence + offset_k.

    Attributes:
        slope: float32 [K].
        offsets: float32 [K].
        precision: float32 [K, 3], how sure both are, of the slope, the pair and the offset: what
            the outcomes so far have told, fading, and the prior.
    """

    slope: Tensor
    offsets: Tensor
    precision: Tensor


class AcceptanceModel:
    """Bayesian online logistic regression, one Newton step a pass; all on the device, no host wait.

    Before any outcome a draft is taken to stand as often as the drafter believes in it.

    Args:
        num_drafts: K.
        device: of the state.
        prior: precision of the first belief: of its slope, and four times that of its offset.
        memory: how many passes' outcomes count; older ones fade.

    Attributes:
        state: changed in place, where a captured pass reads it.
    """

    def __init__(
        self,
        num_drafts: int,
        device: torch.device | str = "cpu",
        *,
        prior: float = 4.0,
        memory: float = 2000.0,
    ) -> None:
        # A slope is worth more than an offset, since confidences spread wider than one.
        self.prior_precision = prior, 0.25 * prior
        self.fade = 1.0 - 1.0 / memory
        self.prior = torch.tensor([prior, 0.0, 0.25 * prior], device=device)
        self.state = Calibration(
            torch.ones(num_drafts, device=device),
            torch.zeros(num_drafts, device=device),
            self.prior.repeat(num_drafts, 1),
        )

    def probabilities(self, confidences: Tensor) -> Tensor:
        """That a draft stands if those before it do, float32 [B, K], of confidences [B, K]."""
        slope, offsets, _ = self.state
        return torch.sigmoid(slope * confidences.clamp(MIN_CONFIDENCE, MAX_CONFIDENCE) + offsets)

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
        x = confidences.clamp(MIN_CONFIDENCE, MAX_CONFIDENCE)
        p = self.probabilities(confidences)
        rest = torch.where(judged, stood.float() - p, 0.0)
        curve = torch.where(judged, p * (1 - p), 0.0)
        slope, offsets, precision = self.state
        told = torch.stack([curve * x * x, curve * x, curve], dim=-1).sum(dim=0)
        precision.copy_(self.prior + self.fade * (precision - self.prior) + told)
        (a, b, d), g, h = precision.unbind(dim=-1), (rest * x).sum(dim=0), rest.sum(dim=0)
        scale = 1.0 / (a * d - b * b)
        slope.add_((d * g - b * h) * scale).clamp_(min=MIN_SLOPE)
        offsets.add_((a * h - b * g) * scale)
