"""What tensor-parallel ranks of a step decide together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist


def agree_across_ranks(group: Any) -> Callable[[int], int] | None:
    """``VerifyLenPolicy``'s ``agree`` for tensor-parallel ranks: the first rank's choice counts.

    Args:
        group: SGLang's ``GroupCoordinator`` of the ranks.
    """
    if group.world_size == 1:
        return None

    def agree(choice: int) -> int:
        chosen = torch.tensor([choice], device="cpu")
        # Between the hosts, so that nothing waits for a device.
        dist.broadcast(chosen, group.ranks[0], group.cpu_group)
        return int(chosen)

    return agree


def any_across_ranks(group: Any) -> Callable[[bool], bool]:
    """Whether something holds on one of the tensor-parallel ranks at least.

    Args:
        group: SGLang's ``GroupCoordinator`` of the ranks.
    """
    if group.world_size == 1:
        return bool

    def holds(here: bool) -> bool:
        found = torch.tensor([int(here)], device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX, group.cpu_group)
        return bool(found)

    return holds
