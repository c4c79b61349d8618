"""Greedy acceptance of compact rows, against the twin and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.accept_greedy import accept_greedy, accept_greedy_naive

pytestmark = pytest.mark.usefixtures("kernel_device")


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(0, 4), count=st.integers(0, 15), data=st.data())
def test_accept_greedy(batch, count, data):
    """Few tokens, so that drafts are often right; some rows are cut."""
    token = st.integers(0, 1)
    verified = [data.draw(st.integers(1, count + 1)) for _ in range(batch)]
    best = torch.tensor([data.draw(token) for _ in range(sum(verified))]).long()
    drafts = torch.tensor([[data.draw(token) for _ in range(count)] for _ in range(batch)])
    drafts = drafts.long().view(batch, count)
    rows = torch.zeros(batch, count + 1, dtype=torch.int64)
    for request, number in enumerate(verified):
        place = torch.arange(count + 1).clamp(max=number - 1)
        rows[request] = sum(verified[:request]) + place
        drafts[request, number - 1 :] = -1
    ours, naive = accept_greedy(drafts, best, rows), accept_greedy_naive(drafts, best, rows)
    for found, expected in zip(ours, naive, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_the_first_wrong_draft_ends_a_run():
    """The second request's third row was cut: its drafts may be right and are not accepted."""
    drafts = torch.tensor([[5, 6, 7], [5, -1, -1]])
    best = torch.tensor([5, 6, 9, 1, 5, 6])
    rows = torch.tensor([[0, 1, 2, 3], [4, 5, 5, 5]])
    accepted = accept_greedy(drafts, best, rows)
    assert accepted.num_accepted.tolist() == [2, 1]
    assert accepted.next_token.tolist() == [9, 6]


def test_faulty_arguments():
    drafts, best = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    rows = torch.zeros(2, 4, dtype=torch.int64)
    for arguments, message in (
        ((drafts.int(), best, rows), "drafts must be int64"),
        ((drafts, best[None], rows), "best must be contiguous"),
        ((drafts, best, rows[:, :3]), r"rows must be contiguous int64 \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            accept_greedy(*arguments)
