"""One step of ``budget.acceptance.AcceptanceModel``, in place and in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dflash_plugin.adaptive.acceptance_model import MIN_SLOPE, AcceptanceModel
from dflash_plugin.decoding.confidence import MAX_CONFIDENCE, MIN_CONFIDENCE


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
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    LEAST_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    w, c = tl.load(slope + place), tl.load(offsets + place)
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
        # The first that fell was judged, those behind it were not.
        judged = inside & (accepted >= place) & (verified > place)
        at = confidences + request.to(tl.int64) * confidence_stride + place
        x = tl.load(at, mask=judged, other=0.0)
        x = tl.minimum(tl.maximum(x, LEAST), MOST)
        p = 1.0 / (1.0 + tl.exp(-(w * x + c)))
        rest = tl.where(judged, tl.where(accepted > place, 1.0, 0.0) - p, 0.0)
        curve = tl.where(judged, p * (1.0 - p), 0.0)
        g0 += rest * x
        g1 += rest
        h00 += curve * x * x
        h01 += curve * x
        h11 += curve
    known = precision + place * 3
    a = prior_slope + fade * (tl.load(known) - prior_slope) + tl.sum(h00, axis=0)
    b = fade * tl.load(known + 1) + tl.sum(h01, axis=0)
    d = prior_offset + fade * (tl.load(known + 2) - prior_offset) + tl.sum(h11, axis=0)
    x, y = tl.sum(g0, axis=0), tl.sum(g1, axis=0)
    scale = 1.0 / (a * d - b * b)
    tl.store(slope + place, tl.maximum(w + (d * x - b * y) * scale, LEAST_SLOPE))
    tl.store(offsets + place, c + (a * y - b * x) * scale)
    tl.store(known, a)
    tl.store(known + 1, b)
    tl.store(known + 2, d)


def learn_acceptance(
    confidences: Tensor,
    committed: Tensor,
    starts: Tensor | None,
    model: AcceptanceModel,
) -> None:
    """Learn from a pass.

    Args:
        confidences: float32 [B, K], of its drafts, contiguous rows.
        committed: int32 or int64 [B], tokens of each request, the bonus token among them.
        starts: int32 [B + 1], where the rows begin that were verified of each request, the anchor's
            among them; None where all drafts were.
        model: its state is changed.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, drafts = _check(confidences, committed, starts, model)
    _kernel[(drafts,)](
        confidences,
        committed,
        starts,
        *model.state,
        batch,
        *model.prior_precision,
        model.fade,
        confidences.stride(0),
        DRAFTS=drafts,
        LEAST=MIN_CONFIDENCE,
        MOST=MAX_CONFIDENCE,
        LEAST_SLOPE=MIN_SLOPE,
        BLOCK=128,
        num_warps=1,
    )


def _check(
    confidences: Tensor, committed: Tensor, starts: Tensor | None, model: AcceptanceModel
) -> tuple[int, int]:
    batch, drafts = confidences.shape
    if confidences.dtype != torch.float32 or confidences.stride(1) != 1:
        raise ValueError("confidences must be float32 [B, K] with contiguous rows")
    if committed.shape != (batch,) or not committed.is_contiguous():
        raise ValueError(f"committed must be contiguous [{batch}]")
    if starts is not None and (starts.shape != (batch + 1,) or starts.dtype != torch.int32):
        raise ValueError(f"starts must be int32 [{batch + 1}]")
    if model.state.slope.shape != (drafts,):
        raise ValueError(f"model must be one of {drafts} drafts")
    return batch, drafts


def learn_acceptance_naive(
    confidences: Tensor,
    committed: Tensor,
    starts: Tensor | None,
    model: AcceptanceModel,
) -> None:
    """``learn_acceptance`` by the model itself."""
    _, drafts = _check(confidences, committed, starts, model)
    verified = torch.full_like(committed, drafts) if starts is None else starts.diff() - 1
    model.observe(confidences, committed.long() - 1, verified.long())
