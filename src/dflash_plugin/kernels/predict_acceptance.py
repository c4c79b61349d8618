"""From the head's normalizer, or a draft's log-odds, to the probability that it is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.language import tl, triton

# Smallest share of the other tokens, as a ratio to the likeliest, that float32 resolves.
MIN_REST = 1e-6


@triton.jit
def _kernel(
    top,
    log_sum_exp,
    slots,
    drafts,
    slope,
    offsets,
    confidences,
    predictions,
    rows,
    confidence_stride,
    prediction_stride,
    SLOPE_BY_DRAFT: tl.constexpr,
    MIN_REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(slots + row, mask=inside, other=-1).to(tl.int64)
    alive = inside & (slot >= 0)
    draft = tl.load(drafts + row, mask=alive, other=0).to(tl.int64)
    confidence = tl.load(top + row, mask=alive, other=0.0)
    if log_sum_exp is not None:
        gap = tl.load(log_sum_exp + row, mask=alive, other=0.0) - confidence
        confidence = -tl.log(tl.maximum(tl.exp(gap) - 1.0, MIN_REST))
    steepness = tl.load(slope + draft * SLOPE_BY_DRAFT, mask=alive, other=0.0)
    value = steepness * confidence + tl.load(offsets + draft, mask=alive, other=0.0)
    probability = 1.0 / (1.0 + tl.exp(-value))
    tl.store(confidences + slot * confidence_stride + draft, confidence, mask=alive)
    tl.store(predictions + slot * prediction_stride + draft, probability, mask=alive)


@with_twin
def predict_acceptance(
    top: Tensor,
    log_sum_exp: Tensor | None,
    slots: Tensor,
    drafts: Tensor,
    slope: Tensor,
    offsets: Tensor,
    confidences: Tensor,
    predictions: Tensor,
) -> None:
    """Write each draft's confidence and acceptance probability, by request, in one launch.

    The confidence is the log-odds of the row's likeliest token, a function of the drafter's
    distribution alone (``adaptive.acceptance_model`` says why it may be nothing else).

    Args:
        top: float32 [T], largest logit of each row.
        log_sum_exp: float32 [T], over the row's logits; None where ``top`` is the confidence.
        slots: int64 [T], the row of the outputs that each draft belongs to; below 0 for padding.
        drafts: int32 or int64 [T], the column of the outputs: the draft's index in its block.
        slope: float32 [1] or [K], of the logistic model: one for all drafts, or one for each.
        offsets: float32 [K], of the logistic model.
        confidences: float32 [R, K], output.
        predictions: float32 [R, K], output: that a draft is accepted if those before it are.

    Raises:
        ValueError: shapes do not fit.
    """
    rows = _check(top, log_sum_exp, slots, drafts, slope, offsets, confidences, predictions)
    if rows == 0:
        return
    block = min(128, triton.next_power_of_2(rows))
    _kernel[(triton.cdiv(rows, block),)](
        top,
        log_sum_exp,
        slots,
        drafts,
        slope,
        offsets,
        confidences,
        predictions,
        rows,
        confidences.stride(0),
        predictions.stride(0),
        SLOPE_BY_DRAFT=slope.numel() > 1,
        MIN_REST=MIN_REST,
        BLOCK=block,
        num_warps=1,
    )


def _check(
    top: Tensor,
    log_sum_exp: Tensor | None,
    slots: Tensor,
    drafts: Tensor,
    slope: Tensor,
    offsets: Tensor,
    confidences: Tensor,
    predictions: Tensor,
) -> int:
    rows = top.shape[0]
    for name, part in (
        ("top", top),
        ("log_sum_exp", log_sum_exp),
        ("slots", slots),
        ("drafts", drafts),
    ):
        if part is not None and (part.shape != (rows,) or not part.is_contiguous()):
            raise ValueError(f"{name} must be contiguous [{rows}]")
    count = offsets.shape[0]
    if offsets.shape != (count,) or slope.shape not in ((1,), (count,)):
        raise ValueError("offsets must be [K], and slope [1] or [K]")
    for name, part in (("confidences", confidences), ("predictions", predictions)):
        if part.dim() != 2 or part.shape[1] != count or part.stride(1) != 1:
            raise ValueError(f"{name} must be [R, {count}] with contiguous rows")
    return rows


def predict_acceptance_naive(
    top: Tensor,
    log_sum_exp: Tensor | None,
    slots: Tensor,
    drafts: Tensor,
    slope: Tensor,
    offsets: Tensor,
    confidences: Tensor,
    predictions: Tensor,
) -> None:
    """``predict_acceptance`` in plain torch; reads ``slots`` back to the host."""
    _check(top, log_sum_exp, slots, drafts, slope, offsets, confidences, predictions)
    confidence = top
    if log_sum_exp is not None:
        confidence = -torch.log(((log_sum_exp - top).exp() - 1.0).clamp(min=MIN_REST))
    steepness = slope.expand(offsets.shape)[drafts.long()]
    probability = torch.sigmoid(steepness * confidence + offsets[drafts.long()])
    alive = slots >= 0
    at = slots[alive], drafts[alive].long()
    confidences[at] = confidence[alive]
    predictions[at] = probability[alive]
