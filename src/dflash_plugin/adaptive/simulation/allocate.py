"""Which drafts of all requests to verify in a step.

Survival never rises along a request's drafts, so that the most valuable drafts of all requests are,
in each, the first ones: sorting is the whole allocation. For every size of a pass the best drafts
that fit give its expected tokens, and the best size has most of them a second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Allocation(NamedTuple):
    """What to verify.

    Attributes:
        num_drafts: int64 [B], the first drafts of each request.
        size: int64 scalar, index of the chosen size.
        expected: float32 scalar, tokens that the step is expected to commit.
        rate: float32 scalar, the same a second.
    """

    num_drafts: Tensor
    size: Tensor
    expected: Tensor
    rate: Tensor


def allocate(
    survival: Tensor,
    sizes: Tensor,
    seconds: Tensor,
    alive: Tensor | None = None,
    *,
    min_drafts: int = 0,
    max_drafts: int | None = None,
) -> Allocation:
    """The drafts whose verification commits most tokens a second.

    Every request commits one token without any draft. Nothing is read back to the host.

    Args:
        survival: float32 [B, K], that a draft and all before it stand; never rising along K.
        sizes: int64 [M], tokens that passes hold, one for every living request among them; rising.
        seconds: float32 [M], of a step of each size.
        alive: bool [B], or None for all.
        min_drafts: first drafts of each request that are verified whatever they promise, where a
            size holds them.
        max_drafts: first drafts that may be verified, or None for all.

    Returns:
        The choice. Where no size holds one token of every living request, nothing is verified
        beyond those.
    """
    batch, count = survival.shape
    place = torch.arange(count, device=survival.device)
    limit = count if max_drafts is None else max_drafts
    living = torch.ones(batch, dtype=torch.bool, device=survival.device)
    if alive is not None:
        living = alive
    usable = living[:, None] & (place < limit)
    # A draft that must be verified goes before all others, in order of its place.
    forced = usable & (place < min_drafts)
    rank = torch.where(forced, 2.0 + (count - place), survival)
    rank = torch.where(usable, rank, -1.0)
    order = rank.flatten().argsort(descending=True, stable=True)
    # Equal values must not put a later draft before an earlier one: a stable sort keeps them.
    value = torch.where(usable, survival, 0.0).flatten()[order]
    gained = torch.cat([value.new_zeros(1), value.cumsum(dim=0)])
    requests, available = living.sum(), usable.sum()
    least = torch.minimum(forced.sum(), (sizes[-1] - requests).clamp(min=0))
    room = torch.minimum(sizes - requests, available)
    expected = requests + gained[room.clamp(min=0)]
    fits = room >= torch.minimum(least, available)
    rate = torch.where(fits, expected / seconds, -1.0)
    best = rate.argmax()
    taken = torch.where(fits[best], room[best], 0)
    chosen = torch.zeros(batch * count, dtype=torch.int64, device=survival.device)
    chosen = chosen.scatter(
        0, order, (torch.arange(batch * count, device=order.device) < taken).long()
    )
    return Allocation(
        chosen.view(batch, count).sum(dim=1), best, expected[best].float(), rate[best].float()
    )
