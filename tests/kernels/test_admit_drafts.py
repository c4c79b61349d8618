"""Which drafts are verified within a budget, against the twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.admit_drafts import admit_drafts, admit_drafts_naive
from tests.helpers.kernel_helpers import DEVICE, integers, random

pytestmark = pytest.mark.usefixtures("kernel_device")


def admitted_by(kernel, acceptance, slots, drafts, others, budget, **options):
    batch = slots.shape[0]
    out = [
        torch.full((size,), -7, dtype=torch.int32, device=DEVICE)
        for size in (batch, batch + 3, batch + 40)
    ]
    kernel(acceptance, slots, drafts, others, budget, *out, **options)
    return out


@settings(max_examples=80, deadline=None)
@given(
    batch=st.sampled_from([1, 2, 5, 64, 130]),
    count=st.sampled_from([1, 3, 7, 15]),
    share=st.floats(0, 1.2),
    whole=st.booleans(),
    min_drafts=st.sampled_from([0, 2]),
    max_drafts=st.sampled_from([None, 1, 5]),
    seed=st.integers(0, 99),
)
def test_admit_drafts(batch, count, share, whole, min_drafts, max_drafts, seed):
    acceptance = torch.sigmoid(2 * random(batch + 9, count, padding=3, seed=seed))
    slots = random(batch + 9, seed=seed).argsort()[:batch]
    drafts = integers(count if whole else 0, count + 1, batch, seed=seed).int()
    others = integers(1, 9, batch, seed=seed).int()
    limit = count if max_drafts is None else max_drafts
    available = int(drafts.clamp(max=limit).sum())
    budget = int(share * available)
    arguments = acceptance, slots, drafts, others, budget
    options = {"min_drafts": min_drafts, "max_drafts": max_drafts}
    taken, logits, queries = admitted_by(admit_drafts, *arguments, **options)
    expected = admitted_by(admit_drafts_naive, *arguments, **options)
    for one, other in zip((taken, logits, queries), expected, strict=True):
        assert torch.equal(one, other)
    assert int(taken.sum()) == min(budget, available)
    assert bool((taken <= drafts.clamp(max=limit)).all())
    assert int(logits[batch]) == int(taken.sum()) + batch
    assert logits[batch + 1 :].tolist() == [-7, -7]
    assert set(queries[batch:].tolist()) == {int(taken.sum() + others.sum())}
    if budget >= min_drafts * batch:
        assert bool((taken >= drafts.clamp(max=min(min_drafts, limit))).all())


def test_the_likeliest_drafts_are_admitted():
    acceptance = torch.tensor([[0.9, 0.9, 0.1], [0.5, 0.99, 0.99], [0.2, 1.0, 1.0]]).to(DEVICE)
    full = torch.full((3,), 3, dtype=torch.int32, device=DEVICE)
    one = torch.ones(3, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(3, device=DEVICE)
    counts, _, _ = admitted_by(admit_drafts, acceptance, slots, full, one, 4)
    # 0.9, 0.81, 0.5, 0.495 are the largest survivals.
    assert counts.tolist() == [2, 2, 0]


def test_equal_drafts_stay_behind_those_before_them():
    acceptance = torch.ones(4, 7).to(DEVICE)
    full = torch.full((4,), 7, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(4, device=DEVICE)
    counts, logits, queries = admitted_by(admit_drafts, acceptance, slots, full, full, 10)
    assert counts.tolist() == [7, 3, 0, 0]
    assert logits[:5].tolist() == [0, 8, 12, 13, 14]
    assert queries[:5].tolist() == [0, 14, 24, 31, 38]


def test_faulty_arguments():
    good = (
        torch.ones(4, 7, device=DEVICE),
        torch.arange(2, device=DEVICE),
        *(torch.ones(2, dtype=torch.int32, device=DEVICE) for _ in range(2)),
        3,
        *(torch.ones(n, dtype=torch.int32, device=DEVICE) for n in (2, 3, 3)),
    )
    for index, bad, message in (
        (0, torch.ones(4, 7, dtype=torch.float64, device=DEVICE), "acceptance must be float32"),
        (2, torch.ones(2, dtype=torch.int64, device=DEVICE), "drafts must be contiguous int32"),
        (6, torch.ones(2, dtype=torch.int32, device=DEVICE), "logit_starts must be int32"),
    ):
        arguments = [*good[:index], bad, *good[index + 1 :]]
        for kernel in (admit_drafts, admit_drafts_naive):
            with pytest.raises(ValueError, match=message):
                kernel(*arguments)
