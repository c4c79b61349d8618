"""Confidences and acceptance probabilities against the twin, and against the logits themselves."""

from __future__ import annotations

import pytest
import torch

from dflash_plugin.kernels.draft_head import draft_head
from dflash_plugin.kernels.predict_acceptance import (
    predict_acceptance,
    predict_acceptance_naive,
)
from dflash_plugin.kernels.reference import confidence
from tests.helpers.kernel_helpers import DEVICE, random

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("batch", [0, 1, 5, 70])
@pytest.mark.parametrize("count", [1, 7, 15])
@pytest.mark.parametrize("confident", [False, True])
def test_predict_acceptance(batch, count, confident):
    rows = batch * count
    top, rest = random(rows, seed=1), random(rows, seed=2) - 1
    log_sum_exp = None if confident else torch.logaddexp(top, rest)
    # Each slot once, and padding behind.
    slots = torch.arange(batch, device=DEVICE).flip(0).repeat_interleave(count)
    slots[rows // 2 :] = -1
    column = torch.arange(count, dtype=torch.int32, device=DEVICE).repeat(batch)
    slope, offsets = torch.tensor([0.7], device=DEVICE), random(count, seed=3)
    outs = []
    for kernel in (predict_acceptance, predict_acceptance_naive):
        out = [torch.full((batch + 2, count), 9.0, device=DEVICE) for _ in range(2)]
        kernel(top, log_sum_exp, slots, column, slope, offsets, *out)
        outs.append(out)
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert bool((one[batch:] == 9).all())


def test_confidences_are_those_of_the_logits():
    hidden, weight = random(12, 64, seed=4), random(300, 64, seed=5) / 4
    choice = draft_head(hidden, weight)
    slots = torch.arange(4, device=DEVICE).repeat_interleave(3)
    drafts = torch.arange(3, device=DEVICE).repeat(4)
    confidences, predictions = (torch.zeros(4, 3, device=DEVICE) for _ in range(2))
    slope, offsets = torch.ones(1, device=DEVICE), torch.zeros(3, device=DEVICE)
    predict_acceptance(
        choice.logits[:, 0], choice.log_sum_exp, slots, drafts, slope, offsets, confidences,
        predictions,
    )  # fmt: skip
    wanted = confidence(hidden @ weight.T).view(4, 3)
    torch.testing.assert_close(confidences, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(predictions, torch.sigmoid(wanted), rtol=1e-3, atol=1e-3)


def test_a_sure_row_stays_finite():
    top = torch.tensor([30.0], device=DEVICE)
    confidences, predictions = (torch.zeros(1, 1, device=DEVICE) for _ in range(2))
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    slope, offsets = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    predict_acceptance(top, top.clone(), at, at, slope, offsets, confidences, predictions)
    assert 13 < float(confidences) < 15
    assert float(predictions) == pytest.approx(1.0, abs=1e-5)
