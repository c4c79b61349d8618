"""From a drafter's confidence to the probability that a draft stands, learnt while serving.

A position's confidence is the log-odds of its likeliest token, a function of the drafter's
distribution and not of the token that was drawn from it. That is all the model may look at: whether
a drawn token is verified must not depend on the token itself, or those that are verified would no
longer be distributed as drawn, and rejection sampling (arXiv 2211.17192) would give another
distribution than the target's. Outcomes of earlier passes lie before every draw, so that the model
may learn from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels.learn_acceptance import Calibration, learn_acceptance, observe
from dflash_plugin.kernels.reference import MAX_CONFIDENCE, MIN_CONFIDENCE

# While serving, one of so many passes teaches: a launch takes its time, outcomes are many.
LEARNING = 4


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
        self.state = Calibration(
            torch.ones(num_drafts, device=device),
            torch.zeros(num_drafts, device=device),
            torch.tensor([prior, 0.0, 0.25 * prior], device=device).repeat(num_drafts, 1),
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
        observe(confidences, accepted, verified, self.state, self.prior_precision, self.fade)

    def learn(self, confidences: Tensor, committed: Tensor, starts: Tensor | None) -> None:
        """``observe`` by what a batch committed, in one launch where kernels run.

        Args:
            confidences: float32 [B, K], of the pass's drafts.
            committed: int32 or int64 [B], tokens of each request, the bonus token included.
            starts: int32 [B + 1], where each request's verified rows begin, the anchor's included;
                None where all drafts were verified.
        """
        learn_acceptance(
            confidences, committed, starts, self.state, self.prior_precision, self.fade
        )
