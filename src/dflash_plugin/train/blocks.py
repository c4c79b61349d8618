"""Which positions of a training batch get a block."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.train.sequences import Batch


def choose_anchors(
    batch: Batch, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Distinct random positions of each response that have a token after them.

    Args:
        batch: B sequences.
        count: anchors a sequence, A; fewer where no response of the batch has as many places.
        generator: on the batch's device; None takes every position from the response's start.

    Returns:
        Anchors int64 [B, A], sorted, and which of them are valid, bool [B, A].
    """
    lengths, prompt_lengths = batch.lengths, batch.prompt_lengths
    offsets = torch.arange(max(batch.longest_response, count), device=lengths.device)
    available = lengths - prompt_lengths - 1
    if generator is None:
        order = offsets.expand(len(lengths), -1)[:, :count]
    else:
        draw = torch.rand(len(lengths), len(offsets), generator=generator, device=lengths.device)
        draw = draw.masked_fill(offsets >= available[:, None], 2.0)
        order = draw.argsort(dim=1)[:, :count]
    # The places come first in each row, so that what is cut off is no anchor anyway.
    order = order[:, : max(1, batch.longest_response - 1)]
    valid = order < available[:, None]
    order, index = torch.where(valid, order, len(offsets)).sort(dim=1)
    valid = valid.gather(1, index)
    return torch.where(valid, prompt_lengths[:, None] + order, prompt_lengths[:, None]), valid
