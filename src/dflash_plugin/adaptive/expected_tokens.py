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

    Blocks of each draft length are expected by themselves: a drafter may draft a position worse in
    a shorter block. Until a shorter block has been drafted, it is expected to draft as the first
    rows of a whole one.

    Args:
        drafts: drafts of a whole block, K.
        size: largest number of requests in a batch.
        device: of the acceptance probabilities.
    """

    def __init__(self, drafts: int, size: int, device: torch.device) -> None:
        self.drafts = drafts
        self.short: int | None = None
        on_gpu = device.type == "cuda"
        self._sums = torch.empty(2 * size * drafts, pin_memory=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None
        self._gained = {drafts: np.array(AcceptanceRates(drafts).expected()) - 1.0}
        self._drafted_short = False
        self._counts = np.arange(drafts + 1)
        # Requests of the reduction that is under way, and the draft lengths that it tells of.
        self._asked, self._steps = 0, 0
        self._told: tuple[int, ...] = (drafts,)

    def add_short_blocks(self, drafts: int) -> None:
        """Expect the tokens of shorter blocks, too.

        Args:
            drafts: of such a block, fewer than of a whole one.
        """
        self.short, first = drafts, self._gained[self.drafts]
        self._gained[drafts] = np.minimum(first, first[drafts])

    def is_due(self) -> bool:
        """Count a step that has drafted; whether its probabilities are to be read."""
        self._steps += 1
        return self._steps % ASKED == 0

    def ask(self, acceptance_probs: Tensor) -> None:
        """Start the reduction, unless one is under way.

        Args:
            acceptance_probs: float32 [B, K] or, of shorter blocks, [B, short], probability that a
                draft is accepted if those before it are.
        """
        if self._asked:
            return
        batch, drafts = acceptance_probs.shape
        survival = acceptance_probs.cumprod(dim=1)
        blocks: Tensor = survival[None]
        told: tuple[int, ...] = (drafts,)
        if drafts == self.short:
            self._drafted_short = True
        elif self.short is not None and not self._drafted_short:
            first = survival.clone()
            first[:, self.short :] = 0
            blocks, told = torch.stack([survival, first]), (drafts, self.short)
        sums = blocks.flatten(1).sort(dim=1, descending=True).values.cumsum(dim=1)
        self._sums[: sums.numel()].copy_(sums.flatten(), non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._asked, self._told = batch, told

    def tokens(self, drafts_each: Sequence[float], drafts: int | None = None) -> list[float]:
        """Tokens that a request commits in a pass, by how many of its drafts are verified.

        Args:
            drafts_each: drafts verified per request on average, those with the highest survival
                probability.
            drafts: drafts of the blocks, those of a whole one if None.
        """
        self._read()
        gained = self._gained[self.drafts if drafts is None else drafts]
        found = 1.0 + np.interp(drafts_each, self._counts, gained)
        return [float(tokens) for tokens in found]

    def _read(self) -> None:
        """Take the sums that have arrived."""
        if not self._asked or (self._event is not None and not self._event.query()):
            return
        requests, self._asked = self._asked, 0
        weight = min(1.0, requests / BLOCKS)
        width = requests * self._told[0]
        for index, drafts in enumerate(self._told):
            sums = self._sums[index * width : (index + 1) * width].numpy()
            by_drafts = sums[requests - 1 :: requests] / requests
            more = self.drafts - len(by_drafts)
            gained = np.concatenate([[0.0], by_drafts, np.repeat(by_drafts[-1:], more)])
            self._gained[drafts] = (1 - weight) * self._gained[drafts] + weight * gained
