"""What the drafts of a batch promise, added up on the device and read without a wait."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dflash_plugin.adaptive.policy import Acceptance

# Blocks that tell what those to come promise.
BLOCKS = 32
# One of so many steps is asked: adding up takes some launches.
ASKED = 8


class ExpectedTokens:
    """What the drafts of a batch are expected to commit, by how many are verified.

    The device adds up the best chances; the host takes the sums once they have arrived, and goes by
    earlier ones until then. Few blocks say little of those to come, so that older ones count too.

    Args:
        drafts: K, of a block.
        size: requests of a batch, at most.
        device: of the chances.
    """

    def __init__(self, drafts: int, size: int, device: torch.device) -> None:
        self.drafts = drafts
        on_gpu = device.type == "cuda"
        self._sums = torch.empty(size * drafts, pin_memory=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None
        self._gained = np.array(Acceptance(drafts).expected()) - 1.0
        self._asked, self._steps = 0, 0

    def is_due(self) -> bool:
        """Whether a step that has drafted is one to be asked."""
        self._steps += 1
        return self._steps % ASKED == 0

    def ask(self, chances: Tensor) -> None:
        """Begin to add up, unless that is under way.

        Args:
            chances: float32 [B, K], that a draft stands if those before it do.
        """
        if self._asked:
            return
        sums = chances.cumprod(dim=1).flatten().sort(descending=True).values.cumsum(dim=0)
        self._sums[: sums.shape[0]].copy_(sums, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._asked = chances.shape[0]

    def tokens(self, drafts_each: float) -> float:
        """That a request commits in a pass, where so many drafts of each are verified on average.

        Those with the best chances are.
        """
        if self._asked and (self._event is None or self._event.query()):
            requests, self._asked = self._asked, 0
            sums = self._sums[: requests * self.drafts].numpy()
            found = np.append(0.0, sums[requests - 1 :: requests] / requests)
            weight = min(1.0, requests / BLOCKS)
            self._gained = (1 - weight) * self._gained + weight * found
        return 1.0 + float(np.interp(drafts_each, np.arange(self.drafts + 1), self._gained))
