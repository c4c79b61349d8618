"""One Newton step of the acceptance model, in place and in one launch.

The model is a logistic regression for each draft position k: the log-odds that a draft is accepted,
if those before it are, is slope_k * confidence + offset_k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.language import tl, triton
from dflash_plugin.kernels.reference import MAX_CONFIDENCE, MIN_CONFIDENCE

# A confidence that counted against its token would be noise.
MIN_SLOPE = 0.05


class Calibration(NamedTuple):
    """The model of K draft positions: logit p = slope_k * confidence + offset_k.

    Attributes:
        slope: float32 [K].
        offsets: float32 [K].
        precision: float32 [K, 3], how sure both are, of the slope, the pair and the offset: what
            the outcomes so far have told, fading, and the prior.
    """

    slope: Tensor
    offsets: Tensor
    precision: Tensor


@triton.jit(do_not_specialize=["batch"])
def _kernel(
    confidences,
    committed,
    starts,
    slope,
    offsets,
    precision,
    batch,
    prior_slope,
    prior_offset,
    fade,
    confidence_stride,
    DRAFTS: tl.constexpr,
    MIN_CONFIDENCE: tl.constexpr,
    MAX_CONFIDENCE: tl.constexpr,
    MIN_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    draft = tl.program_id(0)
    w, c = tl.load(slope + draft), tl.load(offsets + draft)
    g0 = tl.zeros((BLOCK,), dtype=tl.float32)
    g1, h00, h01, h11 = g0, g0, g0, g0
    for start in range(0, batch, BLOCK):
        request = start + tl.arange(0, BLOCK)
        inside = request < batch
        accepted = tl.load(committed + request, mask=inside, other=0) - 1
        verified = accepted * 0 + DRAFTS
        if starts is not None:
            verified = tl.load(starts + request + 1, mask=inside, other=0) - 1
            verified -= tl.load(starts + request, mask=inside, other=0)
        # The first rejected draft was judged, the drafts after it were not.
        judged = inside & (accepted >= draft) & (verified > draft)
        at = confidences + request.to(tl.int64) * confidence_stride + draft
        x = tl.load(at, mask=judged, other=0.0)
        x = tl.minimum(tl.maximum(x, MIN_CONFIDENCE), MAX_CONFIDENCE)
        p = 1.0 / (1.0 + tl.exp(-(w * x + c)))
        rest = tl.where(judged, tl.where(accepted > draft, 1.0, 0.0) - p, 0.0)
        curve = tl.where(judged, p * (1.0 - p), 0.0)
        g0 += rest * x
        g1 += rest
        h00 += curve * x * x
        h01 += curve * x
        h11 += curve
    known = precision + draft * 3
    a = prior_slope + fade * (tl.load(known) - prior_slope) + tl.sum(h00, axis=0)
    b = fade * tl.load(known + 1) + tl.sum(h01, axis=0)
    d = prior_offset + fade * (tl.load(known + 2) - prior_offset) + tl.sum(h11, axis=0)
    x, y = tl.sum(g0, axis=0), tl.sum(g1, axis=0)
    scale = 1.0 / (a * d - b * b)
    tl.store(slope + draft, tl.maximum(w + (d * x - b * y) * scale, MIN_SLOPE))
    tl.store(offsets + draft, c + (a * y - b * x) * scale)
    tl.store(known, a)
    tl.store(known + 1, b)
    tl.store(known + 2, d)


@with_twin
def learn_acceptance(
    confidences: Tensor,
    committed: Tensor,
    starts: Tensor | None,
    model: Calibration,
    prior: tuple[float, float],
    fade: float,
) -> None:
    """Learn from a verify pass.

    Args:
        confidences: float32 [B, K], of the pass's drafts, contiguous rows.
        committed: int32 or int64 [B], tokens of each request, the bonus token included.
        starts: int32 [B + 1], where each request's verified rows begin, the anchor's included; None
            where all drafts were verified.
        model: changed in place.
        prior: precision of the first belief in a slope and in an offset.
        fade: factor on what earlier outcomes have told.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, drafts = _check(confidences, committed, starts, model)
    _kernel[(drafts,)](
        confidences,
        committed,
        starts,
        *model,
        batch,
        *prior,
        fade,
        confidences.stride(0),
        DRAFTS=drafts,
        MIN_CONFIDENCE=MIN_CONFIDENCE,
        MAX_CONFIDENCE=MAX_CONFIDENCE,
        MIN_SLOPE=MIN_SLOPE,
        BLOCK=128,
        num_warps=1,
    )


def _check(
    confidences: Tensor, committed: Tensor, starts: Tensor | None, model: Calibration
) -> tuple[int, int]:
    """B and K."""
    batch, drafts = confidences.shape
    if confidences.dtype != torch.float32 or confidences.stride(1) != 1:
        raise ValueError("confidences must be float32 [B, K] with contiguous rows")
    if committed.shape != (batch,) or not committed.is_contiguous():
        raise ValueError(f"committed must be contiguous [{batch}]")
    if starts is not None and (starts.shape != (batch + 1,) or starts.dtype != torch.int32):
        raise ValueError(f"starts must be int32 [{batch + 1}]")
    if model.slope.shape != (drafts,):
        raise ValueError(f"model must be one of {drafts} drafts")
    return batch, drafts


def learn_acceptance_naive(
    confidences: Tensor,
    committed: Tensor,
    starts: Tensor | None,
    model: Calibration,
    prior: tuple[float, float],
    fade: float,
) -> None:
    """``learn_acceptance`` in plain torch."""
    _, drafts = _check(confidences, committed, starts, model)
    accepted = committed.long() - 1
    verified = torch.full_like(accepted, drafts) if starts is None else starts.diff().long() - 1
    observe(confidences, accepted, verified, model, prior, fade)


def observe(
    confidences: Tensor,
    accepted: Tensor,
    verified: Tensor,
    model: Calibration,
    prior: tuple[float, float],
    fade: float,
) -> None:
    """One Newton step of Bayesian online logistic regression.

    Args:
        confidences: float32 [B, K], of the pass's drafts.
        accepted: int64 [B], accepted drafts.
        verified: int64 [B], drafts that were verified; 0 teaches nothing.
        model: changed in place.
        prior: precision of the first belief in a slope and in an offset.
        fade: factor on what earlier outcomes have told.
    """
    draft = torch.arange(confidences.shape[1], device=confidences.device)
    # The first rejected draft was judged, the drafts after it were not.
    judged = (draft <= accepted[:, None]) & (draft < verified[:, None])
    stood = draft < accepted[:, None]
    slope, offsets, precision = model
    x = confidences.clamp(MIN_CONFIDENCE, MAX_CONFIDENCE)
    p = torch.sigmoid(slope * x + offsets)
    rest = torch.where(judged, stood.float() - p, 0.0)
    curve = torch.where(judged, p * (1 - p), 0.0)
    told = torch.stack([curve * x * x, curve * x, curve], dim=-1).sum(dim=0)
    precision.mul_(fade).add_(told)
    precision[:, 0].add_((1.0 - fade) * prior[0])
    precision[:, 2].add_((1.0 - fade) * prior[1])
    (a, b, d), g, h = precision.unbind(dim=-1), (rest * x).sum(dim=0), rest.sum(dim=0)
    scale = 1.0 / (a * d - b * b)
    slope.add_((d * g - b * h) * scale).clamp_(min=MIN_SLOPE)
    offsets.add_((a * h - b * g) * scale)
