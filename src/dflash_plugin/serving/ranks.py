"""What tensor-parallel ranks of a step decide together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import distributed as dist


class RankGroup(Protocol):
    """The engines' ``GroupCoordinator`` of the ranks."""

    world_size: int
    ranks: Sequence[int]
    cpu_group: dist.ProcessGroup


def agree_across_ranks(group: RankGroup) -> Callable[[int], int] | None:
    """``VerifyLenPolicy``'s ``agree`` for tensor-parallel ranks: the first rank's choice counts.

    Args:
        group: of the ranks.
    """
    if group.world_size == 1:
        return None

    def agree(choice: int) -> int:
        chosen = torch.tensor([choice], device="cpu")
        # Between the hosts, so that nothing waits for a device.
        dist.broadcast(chosen, group.ranks[0], group.cpu_group)
        return int(chosen)

    return agree


def any_across_ranks(group: RankGroup) -> Callable[[bool], bool]:
    """Whether something holds on one of the tensor-parallel ranks at least.

    Args:
        group: of the ranks.
    """
    if group.world_size == 1:
        return bool

    def holds(here: bool) -> bool:
        found = torch.tensor([int(here)], device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX, group.cpu_group)
        return bool(found)

    return holds
