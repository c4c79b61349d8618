"""How probably each draft of a batch stands, out of the draft pass and learnt while serving."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.adaptive.acceptance_model import LEARNING, AcceptanceModel
from dflash_plugin.kernels.predict_acceptance import predict_acceptance


class AcceptancePredictor:
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
        self._requests = torch.arange(size, device=device).repeat_interleave(drafts)
        self._places = torch.arange(drafts, device=device).repeat(size)
        self._passes = 0

    def predict(self, top: Tensor, log_sum_exp: Tensor | None) -> None:
        """Take the draft pass's confidences.

        Args:
            top: float32 [B * K], largest logits of the rows that draft, block by block.
            log_sum_exp: float32 [B * K], over these rows' logits; None where ``top`` holds the
                confidences themselves.
        """
        rows = top.shape[0]
        predict_acceptance(
            top.contiguous(),
            log_sum_exp,
            self._requests[:rows],
            self._places[:rows],
            self.model.state.slope,
            self.model.state.offsets,
            self.confidences,
            self.predictions,
        )

    def learn(self, committed: Tensor, starts: Tensor | None) -> None:
        """Learn now and then from what came of the drafts.

        Args:
            committed: int [B], tokens of each request.
            starts: int32 [B + 1], where the rows begin that were verified of each; None where all
                drafts were.
        """
        self._passes += 1
        if self._passes % LEARNING:
            return
        self.model.learn(self.confidences[: len(committed)], committed, starts)
