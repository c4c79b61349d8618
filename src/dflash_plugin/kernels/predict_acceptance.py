"""From the head's normalizer, or a draft's log-odds, to the probability that it stands."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Where a top token holds all but this share of its row, float32 no longer tells the rest.
LEAST_REST = 1e-6


@triton.jit
def _kernel(
    top,
    log_sum_exp,
    slots,
    places,
    slope,
    offsets,
    features,
    predictions,
    rows,
    feature_stride,
    prediction_stride,
    SLOPE_BY_PLACE: tl.constexpr,
    LEAST_REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(slots + row, mask=inside, other=-1).to(tl.int64)
    alive = inside & (slot >= 0)
    place = tl.load(places + row, mask=alive, other=0).to(tl.int64)
    feature = tl.load(top + row, mask=alive, other=0.0)
    if log_sum_exp is not None:
        gap = tl.load(log_sum_exp + row, mask=alive, other=0.0) - feature
        feature = -tl.log(tl.maximum(tl.exp(gap) - 1.0, LEAST_REST))
    steepness = tl.load(slope + place * SLOPE_BY_PLACE, mask=alive, other=0.0)
    value = steepness * feature + tl.load(offsets + place, mask=alive, other=0.0)
    chance = 1.0 / (1.0 + tl.exp(-value))
    tl.store(features + slot * feature_stride + place, feature, mask=alive)
    tl.store(predictions + slot * prediction_stride + place, chance, mask=alive)


def predict_acceptance(
    top: Tensor,
    log_sum_exp: Tensor | None,
    slots: Tensor,
    places: Tensor,
    slope: Tensor,
    offsets: Tensor,
    features: Tensor,
    predictions: Tensor,
) -> None:
    """Write each draft's confidence and the chance that it stands, by request, in one launch.

    The confidence is the log-odds of the row's likeliest token, which is a function of the
    drafter's distribution alone (``budget.acceptance``).

    Args:
        top: float32 [T], largest logit of each row.
        log_sum_exp: float32 [T], over the row's logits; None where ``top`` is the confidence.
        slots: int64 [T], rows of the outputs; those below 0 are padding.
        places: int32 or int64 [T], columns of the outputs: which draft of its block a row makes.
        slope: float32 [1] or [K], of the logistic model, the same for all places or by place.
        offsets: float32 [K], of the same, by place.
        features: float32 [R, K], takes the confidences.
        predictions: float32 [R, K], takes the chances.

    Raises:
        ValueError: shapes do not fit.
    """
    rows = _check(top, log_sum_exp, slots, places, slope, offsets, features, predictions)
    if rows == 0:
        return
    block = min(128, triton.next_power_of_2(rows))
    _kernel[(triton.cdiv(rows, block),)](
        top,
        log_sum_exp,
        slots,
        places,
        slope,
        offsets,
        features,
        predictions,
        rows,
        features.stride(0),
        predictions.stride(0),
        SLOPE_BY_PLACE=slope.numel() > 1,
        LEAST_REST=LEAST_REST,
        BLOCK=block,
        num_warps=1,
    )


def _check(
    top: Tensor,
    log_sum_exp: Tensor | None,
    slots: Tensor,
    places: Tensor,
    slope: Tensor,
    offsets: Tensor,
    features: Tensor,
    predictions: Tensor,
) -> int:
    rows = top.shape[0]
    for name, part in (
        ("top", top),
        ("log_sum_exp", log_sum_exp),
        ("slots", slots),
        ("places", places),
    ):
        if part is not None and (part.shape != (rows,) or not part.is_contiguous()):
            raise ValueError(f"{name} must be contiguous [{rows}]")
    count = offsets.shape[0]
    if offsets.shape != (count,) or slope.shape not in ((1,), (count,)):
        raise ValueError("offsets must be [K], and slope [1] or [K]")
    for name, part in (("features", features), ("predictions", predictions)):
        if part.dim() != 2 or part.shape[1] != count or part.stride(1) != 1:
            raise ValueError(f"{name} must be [R, {count}] with contiguous rows")
    return rows


def predict_acceptance_naive(
    top: Tensor,
    log_sum_exp: Tensor | None,
    slots: Tensor,
    places: Tensor,
    slope: Tensor,
    offsets: Tensor,
    features: Tensor,
    predictions: Tensor,
) -> None:
    """``predict_acceptance`` in plain torch; reads ``slots`` back to the host."""
    _check(top, log_sum_exp, slots, places, slope, offsets, features, predictions)
    feature = top
    if log_sum_exp is not None:
        feature = -torch.log(((log_sum_exp - top).exp() - 1.0).clamp(min=LEAST_REST))
    steepness = slope.expand(offsets.shape)[places.long()]
    chance = torch.sigmoid(steepness * feature + offsets[places.long()])
    alive = slots >= 0
    at = slots[alive], places[alive].long()
    features[at] = feature[alive]
    predictions[at] = chance[alive]
