"""Expected tokens per number of verified drafts, reduced on the device and read asynchronously."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dflash_plugin.adaptive.policy import AcceptanceRates

# Blocks whose outcome predicts the next ones; a smaller batch counts in proportion.
BLOCKS = 32
# One of so many steps is read: the reduction takes some launches.
ASKED = 8


class ExpectedTokens:
    """How many tokens a batch is expected to commit, by how many drafts are verified.

    The device sums the highest survival probabilities. The host reads the sums once they have
    arrived and uses earlier ones until then. A few blocks say little of the next ones, so a small
    batch is averaged with earlier ones.

    Args:
        drafts: drafts of a block, K.
        size: largest number of requests in a batch.
        device: of the acceptance probabilities.
    """

    def __init__(self, drafts: int, size: int, device: torch.device) -> None:
        self.drafts = drafts
        on_gpu = device.type == "cuda"
        self._sums = torch.empty(size * drafts, pin_memory=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None
        self._gained = np.array(AcceptanceRates(drafts).expected()) - 1.0
        self._counts = np.arange(drafts + 1)
        self._asked, self._steps = 0, 0

    def is_due(self) -> bool:
        """Count a step that has drafted; whether its probabilities are to be read."""
        self._steps += 1
        return self._steps % ASKED == 0

    def ask(self, acceptance_probs: Tensor) -> None:
        """Start the reduction, unless one is under way.

        Args:
            acceptance_probs: float32 [B, K], probability that a draft is accepted if those before
                it are.
        """
        if self._asked:
            return
        survival = acceptance_probs.cumprod(dim=1)
        sums = survival.flatten().sort(descending=True).values.cumsum(dim=0)
        self._sums[: sums.shape[0]].copy_(sums, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._asked = acceptance_probs.shape[0]

    def tokens(self, drafts_each: Sequence[float]) -> list[float]:
        """Tokens that a request commits in a pass, by how many of its drafts are verified.

        Args:
            drafts_each: drafts verified per request on average, those with the highest survival
                probability.
        """
        if self._asked and (self._event is None or self._event.query()):
            requests, self._asked = self._asked, 0
            sums = self._sums[: requests * self.drafts].numpy()
            gained = np.append(0.0, sums[requests - 1 :: requests] / requests)
            weight = min(1.0, requests / BLOCKS)
            self._gained = (1 - weight) * self._gained + weight * gained
        found = 1.0 + np.interp(drafts_each, self._counts, self._gained)
        return [float(tokens) for tokens in found]
