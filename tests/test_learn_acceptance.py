"""One step of the acceptance model in one launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.budget.acceptance import AcceptanceModel
from dflash_plugin.kernels.learn_acceptance import (
    Learnt,
    learn_acceptance,
    learn_acceptance_naive,
)
from kernel_helpers import DEVICE, integers, random

pytestmark = pytest.mark.usefixtures("kernel_device")


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
        learnt = Learnt.of(model)
        for seed in range(3):
            confidences = 6 * random(batch, drafts, seed=seed)
            verified = integers(0, drafts + 1, batch, seed=seed)
            if not cut:
                verified[:] = drafts
            accepted = (random(batch, seed=seed + 9).abs() * (verified + 1)).long()
            accepted = torch.minimum(accepted, verified)
            starts = torch.cat([verified.new_zeros(1), (verified + 1).cumsum(0)]).int()
            run(confidences, (accepted + 1).to(dtype), starts if cut else None, learnt, model)
        states.append(learnt)
    for ours, naive in zip(*states, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)
    assert not torch.equal(states[0].slope, Learnt.of(AcceptanceModel(drafts, DEVICE)).slope)


def test_faulty_arguments():
    model = AcceptanceModel(3, DEVICE)
    learnt, ones = Learnt.of(model), torch.ones(2, dtype=torch.int32)
    good = torch.zeros(2, 3)
    for arguments, message in (
        ((good.double(), ones, None, learnt), "confidences must be float32"),
        ((good, ones[:1], None, learnt), r"committed must be contiguous \[2\]"),
        ((good, ones, ones, learnt), r"starts must be int32 \[3\]"),
        ((good, ones, None, learnt._replace(slope=good[0, :2])), r"slope must be contiguous \[3\]"),
    ):
        for run in (learn_acceptance, learn_acceptance_naive):
            with pytest.raises(ValueError, match=message):
                run(*arguments, model)
