"""Which drafts of all requests to verify in a step.

The survival probability never rises along a request's drafts, so the most valuable drafts of all
requests are the first ones of each request: sorting is the whole allocation. For each size of a
verify pass, the best drafts that fit give its expected tokens. The size with the most expected
tokens per second is chosen.
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
        rate: float32 scalar, expected tokens per second.
    """

    num_drafts: Tensor
    size: Tensor
    expected: Tensor
    rate: Tensor


def allocate(survival: Tensor, sizes: Tensor, seconds: Tensor) -> Allocation:
    """The drafts whose verification commits most tokens a second.

    Every request commits one token without any draft. Nothing is read back to the host.

    Args:
        survival: float32 [B, K], probability that a draft and all before it are accepted; never
            rising along K.
        sizes: int64 [M], tokens that passes hold, one for every request among them; rising.
        seconds: float32 [M], of a step of each size.

    Returns:
        The choice. Where no size holds one token of every request, no draft is verified.
    """
    batch, count = survival.shape
    # Equal values must not put a later draft before an earlier one: a stable sort keeps them.
    value, order = survival.flatten().sort(descending=True, stable=True)
    gained = torch.cat([value.new_zeros(1), value.cumsum(dim=0)])
    room = (sizes - batch).clamp(max=batch * count)
    expected = batch + gained[room.clamp(min=0)]
    rate = torch.where(room >= 0, expected / seconds, -1.0)
    best = rate.argmax()
    rank = torch.arange(batch * count, device=survival.device)
    verified = torch.zeros_like(rank).scatter(0, order, (rank < room[best]).long())
    return Allocation(
        verified.view(batch, count).sum(dim=1), best, expected[best].float(), rate[best].float()
    )
