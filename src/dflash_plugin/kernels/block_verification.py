"""Verification of a drawn block by the joint probability of its drafts.

Rejection sampling judges each draft by itself: where the target likes a draft better than the
drafter does, the surplus ``p / q - 1`` is lost. Block verification carries it over to the drafts
behind. It commits the target's own distribution, and accepts at least as many drafts on average.
Source: Sun et al., "Block Verification Accelerates Speculative Decoding", arXiv 2403.10444,
algorithm 2 and theorem 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels.accept import Accepted
from dflash_plugin.kernels.reference import sample


class BlockAcceptance(NamedTuple):
    """How far a block is accepted: up to the last draft whose own decision comes out as yes.

    Attributes:
        joint: float64 [B, K + 1], how much of the first 0, 1, … K drafts' probability the target
            covers, at most one: ``joint[i] = min(1, joint[i - 1] * p(x_i) / q(x_i))``.
        decisions: float64 [B, K], probability of yes at each draft; 0 where no draft counts.
    """

    joint: Tensor
    decisions: Tensor


def block_acceptance(
    drafts: Tensor, target_probs: Tensor, draft_probs: Tensor, num_drafts: Tensor | None = None
) -> BlockAcceptance:
    """The decisions on blocks, without noise.

    Args:
        drafts: int64 [B, K]; the first below zero ends its block.
        target_probs: [B, K + 1, V], after the anchor and after each draft.
        draft_probs: [B, K, V] that the drafts were drawn from.
        num_drafts: int64 [B], drafts that count, or None for all K.
    """
    count = drafts.shape[1]
    counted = _counted(drafts, num_drafts)
    index = drafts.clamp(min=0)[..., None]
    p = target_probs[:, :-1].gather(-1, index)[..., 0].double()
    q = draft_probs.gather(-1, index)[..., 0].double()
    ratios = torch.where(counted, p / q, 0.0)
    covered = [torch.ones_like(ratios[:, 0]) if count else ratios.new_ones(len(drafts))]
    for ratio in ratios.unbind(dim=1):
        covered.append((covered[-1] * ratio).clamp(max=1.0))
    joint = torch.stack(covered, dim=1)
    left = residual(target_probs[:, 1:-1], draft_probs[:, 1:], joint[:, 1:-1]).sum(dim=-1).double()
    shares = left / (left + 1 - joint[:, 1:-1])
    # Nothing is left and all is covered where p equals q: then a later draft is accepted too.
    inner = torch.where(shares.isnan(), 1.0, shares)
    last = torch.cat([~counted[:, 1:], counted.new_ones(len(drafts), 1)], dim=1)[:, :count]
    inner = torch.cat([inner, inner.new_zeros(len(drafts), 1)], dim=1)[:, :count]
    decisions = torch.where(last, joint[:, 1:], inner)
    return BlockAcceptance(joint, torch.where(counted, decisions, 0.0))


def residual(target_probs: Tensor, draft_probs: Tensor, joint: Tensor) -> Tensor:
    """What the next token is drawn in proportion to where a block is cut.

    Args:
        target_probs: [..., V], at the cut.
        draft_probs: [..., V], of the draft that was dropped.
        joint: [...], of the drafts before the cut.

    Returns:
        [..., V], ``max(joint * p - q, 0)``, not normalized.
    """
    return (joint[..., None].to(target_probs.dtype) * target_probs - draft_probs).clamp_(min=0)


def verify_block(
    drafts: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    accept_u: Tensor,
    next_u: Tensor,
    num_drafts: Tensor | None = None,
) -> Accepted:
    """Accept the front of each block, and draw the token behind it.

    How many drafts stand depends on all drafts and on all of ``accept_u``. A position that is
    drafted again must therefore be drawn and judged with new noise (``block_seeds``).

    Args:
        drafts, target_probs, draft_probs, num_drafts: as in ``block_acceptance``.
        accept_u: [B, K] in [0, 1), for the decision at each draft.
        next_u: [B, K + 1] in [0, 1), for the token that follows 0, 1, … accepted drafts.
    """
    batch, count = drafts.shape
    joint, decisions = block_acceptance(drafts, target_probs, draft_probs, num_drafts)
    places = torch.arange(1, count + 1, device=drafts.device)
    yes = accept_u.double() < decisions
    accepted = torch.cat([places.new_zeros(batch, 1), yes * places], dim=1).amax(dim=1)
    request = torch.arange(batch, device=drafts.device)
    following = target_probs[request, accepted]
    if count:
        judged = accepted.clamp(max=count - 1)
        left = residual(following, draft_probs[request, judged], joint[request, accepted])
        is_cut = (accepted < count) & _counted(drafts, num_drafts)[request, judged]
        # Rounding can leave nothing where p and q are equal; then a cut cannot matter.
        usable = is_cut & (left.sum(dim=-1) > 0)
        following = torch.where(usable[:, None], left, following)
    return Accepted(accepted, sample(following, next_u[request, accepted]))


def _counted(drafts: Tensor, num_drafts: Tensor | None) -> Tensor:
    """bool [B, K], drafts that can be accepted."""
    counted = drafts >= 0
    if num_drafts is not None:
        index = torch.arange(drafts.shape[1], device=drafts.device)
        counted = counted & (index < num_drafts[:, None])
    return counted.long().cumprod(dim=1).bool()
