"""The probability that each draft of a batch is accepted, learnt while serving."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.adaptive.acceptance_model import LEARNING, AcceptanceModel
from dflash_plugin.kernels.predict_acceptance import predict_acceptance


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
        self._requests = torch.arange(size, device=device).repeat_interleave(drafts)
        self._positions = torch.arange(drafts, device=device).repeat(size)
        self._passes = 0

    def predict(self, top: Tensor, log_sum_exp: Tensor | None) -> None:
        """Predict from the draft pass's logits.

        Args:
            top: float32 [B * K], largest logit of each row that drafts, block by block.
            log_sum_exp: float32 [B * K], log-sum-exp of each row's logits; None where ``top`` holds
                the confidences themselves.
        """
        rows = top.shape[0]
        predict_acceptance(
            top.contiguous(),
            log_sum_exp,
            self._requests[:rows],
            self._positions[:rows],
            self.model.state.slope,
            self.model.state.offsets,
            self.confidences,
            self.predictions,
        )

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
