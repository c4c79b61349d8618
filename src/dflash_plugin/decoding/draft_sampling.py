"""How drafts of requests that sample are made: chosen, drawn, or drawn from a sharper distribution.

A draft drawn from q is accepted with probability ``sum(min(p, q))``, the likeliest token of q with
``p(argmax q)``. Which is more depends on target, drafter, temperature and position in the block.
After a verify pass p and q of its first rows are known, and with them what every proposal would
have reached there, whichever made the drafts. So nothing has to be tried out.

Why the text keeps the target's distribution: verification is exact for any proposal distribution r
that it is given, if the draft was drawn from r with noise that nothing before has read. r is q
sharpened by a factor, and q is a function of the committed text. The factor must therefore be
settled before the block is drawn. It is a function of earlier passes: of their p, q and accepted
drafts, up to the row behind the last accepted draft. A choice that looked at the drawn tokens would
break this: "keep the draw if it is the likeliest token, else take the likeliest" is a different
proposal than the one that verification divides by.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dflash_plugin.decoding.sampling import SamplingTensors

DraftSampling = Literal["auto", "greedy", "probabilistic"]

# Of a request's temperature: 0 takes the likeliest token, 1 draws from the drafter's distribution.
FACTORS = (0.0, 0.5, 0.75, 1.0)
# Requests are alike if their temperature is and if both or neither are limited to some tokens.
BUCKET_WIDTH, BUCKETS = 0.2, 8
# Rows that an estimate goes back, and those that it needs.
WINDOW, ENOUGH = 2000.0, 32.0
# Acceptance that another factor must gain over the first one: means of few rows differ by chance,
# and of drawn drafts block verification accepts a little more than these say.
MARGIN = 0.02
# Passes of which one is learnt from: reading a pass's distributions takes a few percent of it.
LEARN_EVERY = 4


def sharpen(probs: Tensor, factors: Tensor) -> Tensor:
    """Distributions at a part of their temperature.

    Args:
        probs: float32 [..., C].
        factors: [...], from 0 to 1; 0 puts all on the first of the likeliest.

    Returns:
        float32 [..., C]; what has no probability gets none.
    """
    share = factors[..., None]
    sharper = torch.softmax(probs.log() / torch.where(share == 0, 1.0, share), dim=-1)
    best = torch.zeros_like(probs).scatter_(-1, probs.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(share == 0, best, sharper)


def expected_acceptance(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Probability that the draft of each of ``FACTORS`` is accepted, by rejection sampling.

    Args:
        target_probs: float32 [..., C], of the tokens that can be drafted; may sum to less than one.
        draft_probs: float32 [..., C], the drafter's own, of the same tokens.

    Returns:
        float32 [..., F].
    """
    best, logs = draft_probs.argmax(dim=-1, keepdim=True), draft_probs.log()
    found = []
    for factor in FACTORS:
        if factor == 0:
            found.append(target_probs.gather(-1, best)[..., 0])
            continue
        proposal = draft_probs if factor == 1 else torch.softmax(logs / factor, dim=-1)
        found.append(torch.minimum(target_probs, proposal).sum(dim=-1))
    return torch.stack(found, dim=-1)


class AcceptanceEstimate:
    """What every factor would have reached lately, by kind of request and position in the block.

    It lives on the device, is updated in place and needs no host wait, so that it fits in a CUDA
    graph. Requests that gave a seed neither read nor change it: their text must repeat in any
    batch.

    Args:
        num_drafts: K.
        device: of the requests' tensors.

    Attributes:
        rates: float32 [2 * BUCKETS, K, F], mean acceptance of the rows seen.
        rows: float32 [2 * BUCKETS, K], rows that a mean is of, at most ``WINDOW``.
    """

    def __init__(self, num_drafts: int, device: torch.device) -> None:
        self.rates = torch.zeros(2 * BUCKETS, num_drafts, len(FACTORS), device=device)
        self.rows = torch.zeros(2 * BUCKETS, num_drafts, device=device)
        self._factors = torch.tensor(FACTORS, device=device)

    def factors(self, sampling: SamplingTensors, seeded: Tensor) -> Tensor:
        """The factor of each draft, float32 [B, K]: the one that is accepted most, by the estimate.

        That of ``start`` stays until another one gains ``MARGIN``.

        Args:
            sampling: of the B requests.
            seeded: bool [B], requests that gave a seed; they take ``start``.
        """
        kind = _kind(sampling)
        first = start(sampling)[:, None]
        favoured = MARGIN * (self._factors == first[..., None])
        best = self._factors[(self.rates[kind] + favoured).argmax(dim=-1)]
        known = (self.rows[kind] >= ENOUGH) & ~seeded[:, None]
        return torch.where(known, best, first)

    def observe(
        self,
        sampling: SamplingTensors,
        target_probs: Tensor,
        draft_probs: Tensor,
        num_accepted: Tensor,
        counts: Tensor,
    ) -> None:
        """Take in a verify pass, up to the row behind the last accepted draft of each block.

        Args:
            sampling: of the B requests.
            target_probs: float32 [B, K', C], K' at most K, of the tokens that can be drafted.
            draft_probs: float32 [B, K', C], the drafter's own, before ``sharpen``.
            num_accepted: int64 [B].
            counts: bool [B], requests to learn from.
        """
        rows = target_probs.shape[1]
        index = torch.arange(rows, device=target_probs.device)
        seen = ((index <= num_accepted[:, None]) & counts[:, None]).float()
        reached = expected_acceptance(target_probs, draft_probs) * seen[..., None]
        kind = _kind(sampling)
        # Sums of a fixed order, unlike index_add_'s on a GPU: ranks that differ in a last bit might
        # choose differently.
        is_kind = (kind[:, None] == torch.arange(len(self.rows), device=kind.device)).float()
        new = (is_kind[:, :, None] * seen[:, None]).sum(dim=0)
        total = (is_kind[:, :, None, None] * reached[:, None]).sum(dim=0)
        kept = self.rows[:, :rows]
        weight = kept + new
        means = (self.rates[:, :rows] * kept[..., None] + total) / weight.clamp(min=1)[..., None]
        self.rates[:, :rows] = means
        self.rows[:, :rows] = weight.clamp(max=WINDOW)


def start(sampling: SamplingTensors) -> Tensor:
    """The factor float32 [B] of requests before anything is known."""
    return torch.ones_like(sampling.temperature)


def _kind(sampling: SamplingTensors) -> Tensor:
    """int64 [B], which estimate a request reads and feeds."""
    bucket = (sampling.temperature / BUCKET_WIDTH).round().long().clamp(max=BUCKETS - 1)
    limited = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    return bucket + BUCKETS * limited
