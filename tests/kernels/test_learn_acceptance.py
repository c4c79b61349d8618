"""One step of the acceptance model against its twin, and through the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.adaptive.acceptance_model import AcceptanceModel
from dflash_plugin.kernels.learn_acceptance import learn_acceptance, learn_acceptance_naive
from tests.helpers.kernel_helpers import DEVICE, integers, random

pytestmark = pytest.mark.usefixtures("kernel_device")


def learnt(model: AcceptanceModel) -> tuple[Any, ...]:
    """A model's state, and what a step takes besides."""
    return model.state, model.prior_precision, model.fade


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([1, 5, 130]),
    drafts=st.sampled_from([1, 7, 15]),
    cut=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_learn_acceptance(batch, drafts, cut, dtype):
    states = []
    for run in (learn_acceptance, learn_acceptance_naive):
        model = AcceptanceModel(drafts, DEVICE)
        for seed in range(3):
            confidences = 6 * random(batch, drafts, seed=seed)
            verified = integers(0, drafts + 1, batch, seed=seed)
            if not cut:
                verified[:] = drafts
            accepted = (random(batch, seed=seed + 9).abs() * (verified + 1)).long()
            accepted = torch.minimum(accepted, verified)
            starts = torch.cat([verified.new_zeros(1), (verified + 1).cumsum(0)]).int()
            committed = (accepted + 1).to(dtype)
            run(confidences, committed, starts if cut else None, *learnt(model))
        states.append(model.state)
    for ours, naive in zip(*states, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)
    assert not torch.equal(states[0].slope, AcceptanceModel(drafts, DEVICE).state.slope)


def test_faulty_arguments():
    model, other = learnt(AcceptanceModel(3, DEVICE)), learnt(AcceptanceModel(2, DEVICE))
    ones = torch.ones(2, dtype=torch.int32)
    good = torch.zeros(2, 3)
    for arguments, message in (
        ((good.double(), ones, None, *model), "confidences must be float32"),
        ((good, ones[:1], None, *model), r"committed must be contiguous \[2\]"),
        ((good, ones, ones, *model), r"starts must be int32 \[3\]"),
        ((good, ones, None, *other), "model must be one of 3 drafts"),
    ):
        for run in (learn_acceptance, learn_acceptance_naive):
            with pytest.raises(ValueError, match=message):
                run(*arguments)


def test_a_model_learns_from_what_was_committed():
    """By batches in one launch as by drafts that stood."""
    launched, observed = AcceptanceModel(3, DEVICE), AcceptanceModel(3, DEVICE)
    confidences, accepted = 4 * random(5, 3), integers(0, 4, 5)
    launched.learn(confidences, (accepted + 1).int(), None)
    observed.observe(confidences, accepted, torch.full_like(accepted, 3))
    for one, other in zip(launched.state, observed.state, strict=True):
        torch.testing.assert_close(one, other)
