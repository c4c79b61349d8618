"""The probability that each draft of a batch is accepted, learnt while serving."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.adaptive.acceptance_model import LEARNING, AcceptanceModel
from dflash_plugin.kernels.predict_acceptance import predict_acceptance

# Log-odds of a draft that was not made.
NOT_MADE = -30.0


class AcceptancePredictor:
    """Acceptance probabilities of the batch whose pass runs.

    Captured graphs write to the tensors, so these are never replaced.

    Args:
        drafts: K, drafts of a block.
        size: largest number of requests in a batch.
        device: where drafts are made.

    Attributes:
        confidences: float32 [size, K], log-odds of the drafter's likeliest tokens.
        predictions: float32 [size, K], probability that a draft is accepted if those before it
            are.
    """

    def __init__(self, drafts: int, size: int, device: torch.device) -> None:
        self.drafts = drafts
        self.model = AcceptanceModel(drafts, device)
        self.confidences, self.predictions = torch.zeros(2, size, drafts, device=device).unbind()
        # The request and the position of each row that drafts, by the drafts of a block.
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        self._passes = 0

    def predict(self, top: Tensor, log_sum_exp: Tensor | None, drafts: int | None = None) -> None:
        """Predict from the draft pass's logits.

        Args:
            top: float32 [B * D], largest logit of each row that drafts, block by block.
            log_sum_exp: float32 [B * D], log-sum-exp of each row's logits; None where ``top`` holds
                the confidences themselves.
            drafts: D, drafts of the blocks; K if None. Further ones, which were not made, are as
                unlikely as can be: they only fill the rows that a captured pass has to spare.
        """
        rows = top.shape[0]
        drafts = drafts or self.drafts
        requests, positions = self._places_of(drafts)
        if drafts < self.drafts:
            self.leave_out(rows // drafts, drafts)
        predict_acceptance(
            top.contiguous(),
            log_sum_exp,
            requests[:rows],
            positions[:rows],
            self.model.state.slope,
            self.model.state.offsets,
            self.confidences,
            self.predictions,
        )

    def leave_out(self, batch: int, drafts: int) -> None:
        """Note that the first ``batch`` requests have no more drafts than these."""
        self.confidences[:batch, drafts:] = NOT_MADE
        self.predictions[:batch, drafts:] = 0.0

    def _places_of(self, drafts: int) -> tuple[Tensor, Tensor]:
        if drafts not in self._places:
            size, device = len(self.predictions), self.predictions.device
            self._places[drafts] = (
                torch.arange(size, device=device).repeat_interleave(drafts),
                torch.arange(drafts, device=device).repeat(size),
            )
        return self._places[drafts]

    def compile_ahead(self, starts: Tensor) -> None:
        """Compile the launches of ``learn``, and learn nothing.

        Args:
            starts: int32 [2], the rows of one request.
        """
        model = AcceptanceModel(self.drafts, self.confidences.device)
        committed = torch.ones(1, dtype=torch.int32, device=self.confidences.device)
        for rows in (None, starts):
            model.learn(self.confidences[:1], committed, rows)

    def learn(self, committed: Tensor, starts: Tensor | None) -> None:
        """Learn from one of ``LEARNING`` passes, by which drafts were accepted.

        Args:
            committed: int [B], tokens that each request committed.
            starts: int32 [B + 1], the first verified row of each request, and the end of the last;
                None where all drafts were verified.
        """
        self._passes += 1
        if self._passes % LEARNING:
            return
        self.model.learn(self.confidences[: len(committed)], committed, starts)
