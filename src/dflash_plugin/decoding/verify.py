"""Lossless verification of drafted blocks, without any engine.

Everything runs on the device without a host wait and with fixed shapes, so it fits in a CUDA graph.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.decoding.sampling import SamplingTensors, probabilities
from dflash_plugin.kernels.accept import rejection_sample
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


def verify(
    drafts: Tensor,
    target_logits: Tensor,
    draft_probs: Tensor | None,
    params: SamplingTensors,
    positions: Tensor,
    num_drafts: Tensor | None = None,
    all_greedy: bool = False,
) -> Verdict:
    """Verify blocks with each request's own sampling.

    The noise for the token at absolute position n is keyed by n, so a request's tokens depend
    neither on its batch nor on where its blocks begin.

    Args:
        drafts: int64 [B, K].
        target_logits: [B, K + 1, V], the target's processors applied.
        draft_probs: [B, K, V] that the drafts were drawn from, or None for chosen drafts.
        params: of the B requests.
        positions: int64 [B], the anchors' positions.
        num_drafts: int64 [B] or None.
        all_greedy: no request samples; takes the shorter way.
    """
    if all_greedy:
        return verify_greedy(drafts, target_logits.argmax(dim=-1), num_drafts)
    offsets = torch.arange(1, target_logits.shape[1] + 1, device=drafts.device)
    places = positions[:, None] + offsets
    return verify_sampled(
        drafts,
        probabilities(target_logits, params),
        draft_probs,
        uniforms(params.seed, places[:, :-1], Stream.ACCEPT),
        uniforms(params.seed, places, Stream.NEXT),
        num_drafts,
    )


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
        ``FinishReason`` int64 [B]; a stop token on the last allowed place counts as a stop.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    limit = torch.minimum(num_tokens, remaining.clamp(min=0))
    is_stop = (tokens[..., None] == stop_ids[:, None]).any(dim=-1) & (tokens >= 0)
    is_stop = is_stop & (place < limit[:, None])
    stopped = is_stop.any(dim=1)
    committed = torch.where(stopped, is_stop.long().argmax(dim=1) + 1, limit)
    full = committed >= remaining
    reason = torch.where(stopped, int(FinishReason.STOP), 0)
    reason = torch.where(full & ~stopped, int(FinishReason.LENGTH), reason)
    return committed, stopped | full, reason


def _counts(drafts: Tensor, num_drafts: Tensor) -> Tensor:
    return torch.arange(drafts.shape[1], device=drafts.device) < num_drafts[:, None]


def _verdict(drafts: Tensor, accepted: Tensor, following: Tensor) -> Verdict:
    place = torch.arange(drafts.shape[1] + 1, device=drafts.device)
    padded = torch.cat([drafts, drafts.new_full((drafts.shape[0], 1), -1)], dim=1)
    tokens = torch.where(place < accepted[:, None], padded, -1)
    tokens = torch.where(place == accepted[:, None], following[:, None], tokens)
    return Verdict(accepted, following, tokens)
