"""How probably each draft of a batch stands, out of the draft pass and learnt while serving."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.budget.acceptance import AcceptanceModel

if TYPE_CHECKING:
    from dflash_plugin.kernels.draft_head import HeadChoice

# One of so many passes teaches the model: its launches take their time, outcomes are many.
LEARNING = 8


class Chances:
    """Of the batch whose pass runs; what is captured in graphs stays where it is.

    Args:
        drafts: K, of a block.
        size: requests of a batch, at most.
        device: where drafts are made.

    Attributes:
        confidences: float32 [size, K], log-odds of the drafter's likeliest tokens.
        predictions: float32 [size, K], that a draft stands if those before it do.
    """

    def __init__(self, drafts: int, size: int, device: torch.device) -> None:
        self.drafts = drafts
        self.model = AcceptanceModel(drafts, device)
        self.confidences, self.predictions = torch.zeros(2, size, drafts, device=device).unbind()
        self._slope, self._offsets = (part.contiguous() for part in self.model.state.weights.T)
        self._requests = torch.arange(size, device=device).repeat_interleave(drafts)
        self._places = torch.arange(drafts, device=device).repeat(size)
        self._passes = 0

    def predict(self, choice: HeadChoice) -> None:
        """Take the draft pass's confidences.

        Args:
            choice: of rows [B * K] that draft, block by block.
        """
        from dflash_plugin.kernels.predict_acceptance import (
            predict_acceptance,
            predict_acceptance_naive,
        )

        rows = choice.log_sum_exp.shape[0]
        run = predict_acceptance
        if not kernels.available(choice.log_sum_exp.device):
            run = predict_acceptance_naive
        run(
            choice.logits[:, 0].contiguous(),
            choice.log_sum_exp,
            self._requests[:rows],
            self._places[:rows],
            self._slope,
            self._offsets,
            self.confidences,
            self.predictions,
        )

    def learn(self, accepted: Tensor, verified: Tensor) -> None:
        """Learn now and then from what came of the drafts.

        Args:
            accepted: int64 [B].
            verified: int64 [B].
        """
        self._passes += 1
        if self._passes % LEARNING:
            return
        self.model.observe(self.confidences[: len(accepted)], accepted, verified)
        slope, offsets = self.model.state.weights.T
        self._slope.copy_(slope)
        self._offsets.copy_(offsets)
