"""Lossless verification of drafted blocks, without any engine.

Everything runs on the device without a host wait and with fixed shapes, so it fits in a CUDA graph.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.decoding.sampling import block_seeds
from dflash_plugin.kernels.accept import rejection_sample
from dflash_plugin.kernels.block_verification import verify_block
from dflash_plugin.kernels.uniforms import Stream, uniforms


class FinishReason(IntEnum):
    """Why a request ended, or NONE while it runs."""

    NONE = 0
    STOP = 1
    LENGTH = 2


class Verdict(NamedTuple):
    """What a verify pass commits.

    Attributes:
        num_accepted: int64 [B], drafts accepted.
        next_token: int64 [B], the bonus token or the correction.
        tokens: int64 [B, K + 1], accepted drafts, then ``next_token``, then -1.
    """

    num_accepted: Tensor
    next_token: Tensor
    tokens: Tensor


def verify_greedy(drafts: Tensor, target: Tensor, num_drafts: Tensor | None = None) -> Verdict:
    """Accept drafts while they equal the target's own tokens.

    Args:
        drafts: int64 [B, K]; below zero is invalid and ends acceptance.
        target: int64 [B, K + 1], the target's argmax after the anchor and after each draft.
        num_drafts: int64 [B], drafts that count, or None for all K.
    """
    agree = drafts == target[:, :-1]
    if num_drafts is not None:
        agree = agree & _counts(drafts, num_drafts)
    accepted = agree.long().cumprod(dim=1).sum(dim=1)
    following = target.gather(1, accepted[:, None])[:, 0]
    return _verdict(drafts, accepted, following)


def verify_sampled(
    drafts: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    accept_u: Tensor,
    next_u: Tensor,
    num_drafts: Tensor | None = None,
) -> Verdict:
    """``rejection_sample``: what is committed is distributed as the target alone would draw it.

    Args:
        drafts: int64 [B, K]; below zero is invalid: the token there is drawn from the target.
        target_probs: [B, K + 1, V], after the anchor and after each draft.
        draft_probs: [B, K, V] that the drafts were drawn from, or None where they were chosen.
        accept_u: [B, K] in [0, 1), for the decision on each draft.
        next_u: [B, K + 1] in [0, 1), for the token that follows 0, 1, ... accepted drafts.
        num_drafts: int64 [B], drafts that count, or None for all K.
    """
    if num_drafts is not None:
        drafts = drafts.masked_fill(~_counts(drafts, num_drafts), -1)
    return _verdict(drafts, *rejection_sample(drafts, target_probs, draft_probs, accept_u, next_u))


def verify_drawn(
    drafts: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    accept_u: Tensor,
    next_u: Tensor,
    num_drafts: Tensor | None = None,
) -> Verdict:
    """``verify_block``: as ``verify_sampled``, and more drafts are accepted."""
    accepted = verify_block(drafts, target_probs, draft_probs, accept_u, next_u, num_drafts)
    return _verdict(drafts, *accepted)


def verify(
    drafts: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    seed: Tensor,
    positions: Tensor,
    num_drafts: Tensor | None = None,
) -> Verdict:
    """Verify blocks of requests that sample: drawn ones whole, chosen ones draft by draft.

    The noise for the token at absolute position n is keyed by n, and for decisions on a drawn
    block by its anchor's position too, so a request's tokens do not depend on its batch.

    Args:
        drafts: int64 [B, K].
        target_probs: [B, K + 1, V], after the anchor and after each draft.
        draft_probs: [B, K, V] that the drafts were drawn from, or None for chosen drafts.
        seed: int64 [B], of the requests.
        positions: int64 [B], the anchors' positions.
        num_drafts: int64 [B] or None.
    """
    offsets = torch.arange(1, target_probs.shape[1] + 1, device=drafts.device)
    token_positions = positions[:, None] + offsets
    next_u = uniforms(seed, token_positions, Stream.NEXT)
    if draft_probs is None:
        accept_u = uniforms(seed, token_positions[:, :-1], Stream.ACCEPT)
        return verify_sampled(drafts, target_probs, None, accept_u, next_u, num_drafts)
    accept_u = uniforms(block_seeds(seed, positions), token_positions[:, :-1], Stream.ACCEPT)
    return verify_drawn(drafts, target_probs, draft_probs, accept_u, next_u, num_drafts)


def commit(
    tokens: Tensor, num_tokens: Tensor, stop_ids: Tensor, remaining: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a verified run at the first stop token and at the length limit.

    Args:
        tokens: int64 [B, K + 1].
        num_tokens: int64 [B], how many of them were verified.
        stop_ids: int64 [B, S], padded with -1.
        remaining: int64 [B], tokens that each request may still write.

    Returns:
        num_committed int64 [B] (a stop token included), finished bool [B], and the reason as a
        ``FinishReason`` int64 [B]; a stop token at the last allowed position counts as a stop.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    limit = torch.minimum(num_tokens, remaining.clamp(min=0))
    is_stop = (tokens[..., None] == stop_ids[:, None]).any(dim=-1) & (tokens >= 0)
    is_stop = is_stop & (index < limit[:, None])
    stopped = is_stop.any(dim=1)
    committed = torch.where(stopped, is_stop.long().argmax(dim=1) + 1, limit)
    full = committed >= remaining
    reason = torch.where(stopped, int(FinishReason.STOP), 0)
    reason = torch.where(full & ~stopped, int(FinishReason.LENGTH), reason)
    return committed, stopped | full, reason


def _counts(drafts: Tensor, num_drafts: Tensor) -> Tensor:
    return torch.arange(drafts.shape[1], device=drafts.device) < num_drafts[:, None]


def _verdict(drafts: Tensor, accepted: Tensor, following: Tensor) -> Verdict:
    index = torch.arange(drafts.shape[1] + 1, device=drafts.device)
    padded = torch.cat([drafts, drafts.new_full((drafts.shape[0], 1), -1)], dim=1)
    tokens = torch.where(index < accepted[:, None], padded, -1)
    tokens = torch.where(index == accepted[:, None], following[:, None], tokens)
    return Verdict(accepted, following, tokens)
