"""The kernels of adaptive verification: confidences, and the drafts that a budget holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.admit_drafts import admit_drafts, admit_drafts_naive
from dflash_plugin.kernels.draft_head import draft_head
from dflash_plugin.kernels.predict_acceptance import (
    predict_acceptance,
    predict_acceptance_naive,
)
from dflash_plugin.kernels.reference import confidence
from tests.helpers.kernel_helpers import DEVICE, integers, random

pytestmark = pytest.mark.usefixtures("kernel_device")


def admitted_by(kernel, chances, slots, drafts, others, budget, **options):
    batch = slots.shape[0]
    out = [
        torch.full((size,), -7, dtype=torch.int32, device=DEVICE)
        for size in (batch, batch + 3, batch + 40)
    ]
    kernel(chances, slots, drafts, others, budget, *out, **options)
    return out


@settings(max_examples=80, deadline=None)
@given(
    batch=st.sampled_from([1, 2, 5, 64, 130]),
    places=st.sampled_from([1, 3, 7, 15]),
    share=st.floats(0, 1.2),
    whole=st.booleans(),
    least=st.sampled_from([0, 2]),
    most=st.sampled_from([None, 1, 5]),
    seed=st.integers(0, 99),
)
def test_admit_drafts(batch, places, share, whole, least, most, seed):
    chances = torch.sigmoid(2 * random(batch + 9, places, padding=3, seed=seed))
    slots = random(batch + 9, seed=seed).argsort()[:batch]
    drafts = integers(places if whole else 0, places + 1, batch, seed=seed).int()
    others = integers(1, 9, batch, seed=seed).int()
    limit = places if most is None else most
    available = int(drafts.clamp(max=limit).sum())
    budget = int(share * available)
    arguments = chances, slots, drafts, others, budget
    options = {"least": least, "most": most}
    counts, logits, queries = admitted_by(admit_drafts, *arguments, **options)
    expected = admitted_by(admit_drafts_naive, *arguments, **options)
    for one, other in zip((counts, logits, queries), expected, strict=True):
        assert torch.equal(one, other)
    assert int(counts.sum()) == min(budget, available)
    assert bool((counts <= drafts.clamp(max=limit)).all())
    assert int(logits[batch]) == int(counts.sum()) + batch
    assert logits[batch + 1 :].tolist() == [-7, -7]
    assert set(queries[batch:].tolist()) == {int(counts.sum() + others.sum())}
    if budget >= least * batch:
        assert bool((counts >= drafts.clamp(max=min(least, limit))).all())


def test_the_most_promising_drafts_are_admitted():
    chances = torch.tensor([[0.9, 0.9, 0.1], [0.5, 0.99, 0.99], [0.2, 1.0, 1.0]]).to(DEVICE)
    full = torch.full((3,), 3, dtype=torch.int32, device=DEVICE)
    one = torch.ones(3, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(3, device=DEVICE)
    counts, _, _ = admitted_by(admit_drafts, chances, slots, full, one, 4)
    # 0.9, 0.81, 0.5, 0.495 are the largest survivals.
    assert counts.tolist() == [2, 2, 0]


def test_equal_drafts_stay_behind_those_before_them():
    chances = torch.ones(4, 7).to(DEVICE)
    full = torch.full((4,), 7, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(4, device=DEVICE)
    counts, logits, queries = admitted_by(admit_drafts, chances, slots, full, full, 10)
    assert counts.tolist() == [7, 3, 0, 0]
    assert logits[:5].tolist() == [0, 8, 12, 13, 14]
    assert queries[:5].tolist() == [0, 14, 24, 31, 38]


def test_faulty_arguments_of_admission():
    good = (
        torch.ones(4, 7, device=DEVICE),
        torch.arange(2, device=DEVICE),
        *(torch.ones(2, dtype=torch.int32, device=DEVICE) for _ in range(2)),
        3,
        *(torch.ones(n, dtype=torch.int32, device=DEVICE) for n in (2, 3, 3)),
    )
    for index, bad, message in (
        (0, torch.ones(4, 7, dtype=torch.float64, device=DEVICE), "chances must be float32"),
        (2, torch.ones(2, dtype=torch.int64, device=DEVICE), "drafts must be contiguous int32"),
        (6, torch.ones(2, dtype=torch.int32, device=DEVICE), "logit_starts must be int32"),
    ):
        arguments = [*good[:index], bad, *good[index + 1 :]]
        for kernel in (admit_drafts, admit_drafts_naive):
            with pytest.raises(ValueError, match=message):
                kernel(*arguments)


@pytest.mark.parametrize("batch", [0, 1, 5, 70])
@pytest.mark.parametrize("places", [1, 7, 15])
@pytest.mark.parametrize("confident", [False, True])
def test_predict_acceptance(batch, places, confident):
    rows = batch * places
    top, rest = random(rows, seed=1), random(rows, seed=2) - 1
    log_sum_exp = None if confident else torch.logaddexp(top, rest)
    # Each slot once, and padding behind.
    slots = torch.arange(batch, device=DEVICE).flip(0).repeat_interleave(places)
    slots[rows // 2 :] = -1
    column = torch.arange(places, dtype=torch.int32, device=DEVICE).repeat(batch)
    slope, offsets = torch.tensor([0.7], device=DEVICE), random(places, seed=3)
    outs = []
    for kernel in (predict_acceptance, predict_acceptance_naive):
        out = [torch.full((batch + 2, places), 9.0, device=DEVICE) for _ in range(2)]
        kernel(top, log_sum_exp, slots, column, slope, offsets, *out)
        outs.append(out)
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert bool((one[batch:] == 9).all())


def test_confidences_are_those_of_the_logits():
    hidden, weight = random(12, 64, seed=4), random(300, 64, seed=5) / 4
    choice = draft_head(hidden, weight)
    slots = torch.arange(4, device=DEVICE).repeat_interleave(3)
    places = torch.arange(3, device=DEVICE).repeat(4)
    features, predictions = (torch.zeros(4, 3, device=DEVICE) for _ in range(2))
    slope, offsets = torch.ones(1, device=DEVICE), torch.zeros(3, device=DEVICE)
    predict_acceptance(
        choice.logits[:, 0], choice.log_sum_exp, slots, places, slope, offsets, features,
        predictions,
    )  # fmt: skip
    wanted = confidence(hidden @ weight.T).view(4, 3)
    torch.testing.assert_close(features, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(predictions, torch.sigmoid(wanted), rtol=1e-3, atol=1e-3)


def test_a_sure_row_stays_finite():
    top = torch.tensor([30.0], device=DEVICE)
    features, predictions = (torch.zeros(1, 1, device=DEVICE) for _ in range(2))
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    slope, offsets = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    predict_acceptance(top, top.clone(), at, at, slope, offsets, features, predictions)
    assert 13 < float(features) < 15
    assert float(predictions) == pytest.approx(1.0, abs=1e-5)
