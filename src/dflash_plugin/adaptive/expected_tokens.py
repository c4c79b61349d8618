"""Expected tokens per number of verified drafts, reduced on the device and read asynchronously."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_plugin.adaptive.acceptance_rates import AcceptanceRates

Gained = NDArray[np.float64]

# Blocks whose outcome predicts the next ones; a smaller batch counts in proportion.
BLOCKS = 32
# One of so many steps is read: the reduction takes some launches.
ASKED = 8
# Comparisons of shorter blocks with the first rows of whole ones that count; older ones fade.
COMPARED = 8
# Batches are of about as many requests where one has this share of the other's at least.
ALIKE = 0.8
# The fewest tokens that anything is compared with.
LEAST = 1e-3


class ExpectedTokens:
    """How many tokens a batch is expected to commit, by how many drafts are verified.

    The device sums the highest survival probabilities. The host reads the sums once they have
    arrived and uses earlier ones until then. A few blocks say little of the next ones, so a small
    batch is averaged with earlier ones.

    Texts get easier and harder, so that blocks of two lengths can only be compared at the same
    time. A whole block tells what its first rows alone would commit; ``_quality`` is how a shorter
    block that was drafted soon after compares with those rows, as a drafter may draft a position
    worse in a shorter block. While one length is drafted, both follow it.

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
        self._counts = np.arange(drafts + 1)
        # Tokens beside the anchor's by verified drafts: of whole blocks, of their first rows, and
        # of shorter blocks; and what whole blocks commit for each token of their first rows.
        self._whole: Gained = np.array(AcceptanceRates(drafts).expected()) - 1.0
        self._first = self._shorter = self._whole
        self._more: Gained = np.ones(drafts + 1)
        # What a shorter block commits for each token of the first rows of a whole one, and the
        # drafts and requests that were read last.
        self._quality, self._last = 1.0, (0, 0)
        # Requests and drafts of the reduction that is under way.
        self._asked, self._told, self._steps = 0, drafts, 0

    def add_short_blocks(self, drafts: int) -> None:
        """Expect the tokens of shorter blocks, too.

        Args:
            drafts: of such a block, fewer than of a whole one.
        """
        self.short = drafts
        self._first = self._shorter = np.minimum(self._whole, self._whole[drafts])
        self._more[1:] = self._whole[1:] / self._first[1:]

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
        blocks = acceptance_probs.cumprod(dim=1)[None]
        if self.short is not None and drafts == self.drafts:
            blocks = torch.cat([blocks, blocks])
            blocks[1, :, self.short :] = 0
        sums = blocks.flatten(1).sort(dim=1, descending=True).values.cumsum(dim=1)
        self._sums[: sums.numel()].copy_(sums.flatten(), non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._asked, self._told = batch, drafts

    def tokens(self, drafts_each: Sequence[float], drafts: int | None = None) -> list[float]:
        """Tokens that a request commits in a pass, by how many of its drafts are verified.

        Args:
            drafts_each: drafts verified per request on average, those with the highest survival
                probability.
            drafts: drafts of the blocks, those of a whole one if None.
        """
        self._read()
        gained = self._whole if drafts in (None, self.drafts) else self._shorter
        found = 1.0 + np.interp(drafts_each, self._counts, gained)
        return [float(tokens) for tokens in found]

    def _read(self) -> None:
        """Take the sums that have arrived."""
        if not self._asked or (self._event is not None and not self._event.query()):
            return
        requests, self._asked = self._asked, 0
        (drafts, batch), self._last = self._last, (self._told, requests)
        changed = drafts not in (0, self._told)
        compares = changed and ALIKE * max(batch, requests) <= min(batch, requests)
        if self._told == self.drafts:
            self._whole = self._averaged(self._whole, requests, 0)
            if self.short is None:
                return
            self._first = self._averaged(self._first, requests, 1)
            self._more[1:] = self._whole[1:] / np.maximum(self._first[1:], LEAST)
            self._compare(compares)
            self._shorter = self._quality * self._first
        else:
            self._shorter = self._averaged(self._shorter, requests, 0)
            self._compare(compares)
            self._first = self._shorter / max(self._quality, LEAST)
            self._whole = self._first * self._more

    def _compare(self, compares: bool) -> None:
        """Compare shorter blocks with the first rows of whole ones, read one after the other.

        Either may have been read first, so that texts and predictions that get better do not count
        in the end. Batches of other sizes are not compared: the last texts of a load are its
        hardest.

        Args:
            compares: the last two were of both kinds, and of about as many requests.
        """
        if compares:
            found = float(self._shorter[-1] / max(self._first[-1], LEAST))
            self._quality += (found - self._quality) / COMPARED

    def _averaged(self, before: Gained, requests: int, block: int) -> Gained:
        """The sums of a block that were read, with earlier ones where they are of few requests."""
        width = requests * self._told
        sums = self._sums[block * width : (block + 1) * width].numpy()
        by_drafts = sums[requests - 1 :: requests] / requests
        more = self.drafts - len(by_drafts)
        gained = np.concatenate([[0.0], by_drafts, np.repeat(by_drafts[-1:], more)])
        weight = min(1.0, requests / BLOCKS)
        found: Gained = (1 - weight) * before + weight * gained
        return found
