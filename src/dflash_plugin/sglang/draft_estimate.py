"""Which drafts requests that sample are given: the core's running estimate, over SGLang's passes.

The choice is a factor of the temperature for each draft (``decoding.draft_sampling``). Factors stay
on the device: drafts are drawn behind the captured draft pass, so that another factor needs no
other graph, and nothing waits for the host.

All tensor-parallel ranks choose alike: they learn the same numbers from gathered logits, in the
same passes, and sum them in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.decoding.draft_sampling import LEARN_EVERY, AcceptanceEstimate
from dflash_plugin.decoding.sampling import SamplingTensors
from dflash_plugin.kernels.accept import Accepted, Sampled

# Requests that a pass is learnt from: each needs memory for several distributions of its rows.
REQUESTS = 4


class Lesson(NamedTuple):
    """What a pass keeps until it is verified, to be learnt from.

    Attributes:
        requests: int64 [R], which of the batch.
        draft_probs: float32 [R, K, V] or [R, K, C] of candidates, the drafter's own distributions.
    """

    requests: Tensor
    draft_probs: Tensor


class DraftEstimate:
    """Chooses by what earlier passes would have accepted.

    Args:
        num_drafts: K.
        device: of the batches.
    """

    def __init__(self, num_drafts: int, device: torch.device) -> None:
        self.acceptance = AcceptanceEstimate(num_drafts, device)
        self.device = device
        self._passes = 0

    def factors(self, sampling: SamplingTensors, seeded: Tensor) -> Tensor:
        """The factor of each draft, float32 [B, K].

        Args:
            sampling: of the B requests.
            seeded: bool [B], requests that gave a seed.
        """
        return self.acceptance.factors(sampling, seeded)

    def learnt_from(self, batch: int) -> Tensor | None:
        """Requests int64 [R] of a batch that its pass is learnt from; None in most passes."""
        lesson, skipped = divmod(self._passes, LEARN_EVERY)
        self._passes += 1
        if skipped:
            return None
        first = lesson * REQUESTS % batch
        return torch.arange(first, min(first + REQUESTS, batch), device=self.device)

    def learn(
        self,
        lesson: Lesson,
        judged: Sampled,
        accepted: Accepted,
        sampling: SamplingTensors,
        seeded: Tensor,
    ) -> None:
        """Take in a verified pass.

        Drafts that were not verified lie behind the last accepted one, so that their rows of the
        target, which are others', are left out.

        Args:
            lesson: of the pass.
            judged: what its drafts were judged by.
            accepted: what it committed.
            sampling: of the B requests.
            seeded: bool [B].
        """
        requests = lesson.requests
        if judged.rows is None:
            probs = judged.target_probs[requests, :-1]
        else:
            probs = judged.target_probs[judged.rows[requests, :-1]]
        if judged.candidates is not None:
            probs = probs.gather(-1, judged.candidates[requests])
        self.acceptance.observe(
            sampling.of_rows(requests),
            probs,
            lesson.draft_probs,
            accepted.num_accepted[requests].long(),
            ~seeded[requests],
        )
