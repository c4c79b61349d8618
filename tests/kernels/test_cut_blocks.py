"""Blocks compacted to their verified rows, against the twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.cut_blocks import cut_blocks, cut_blocks_naive

pytestmark = pytest.mark.usefixtures("kernel_device")


def blocks(batch: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    tokens = torch.arange(1, batch * (rows + 3) + 1).view(batch, rows + 3)[:, :rows]
    positions = torch.arange(batch * rows, dtype=dtype) + 1000
    return tokens, positions, torch.arange(batch * rows, dtype=dtype).flip(0)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    rows=st.sampled_from([1, 7, 16]),
    padded=st.integers(0, 3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    even=st.booleans(),
    data=st.data(),
)
def test_cut_blocks(batch, rows, padded, dtype, even, data):
    width = data.draw(st.integers(1, rows))
    whole, capacity = blocks(batch, rows, dtype), batch + padded
    # Rows move from one request to another, so that the batch keeps its size.
    counts = torch.full((batch,), width)
    for taker, giver in zip(range(batch), reversed(range(batch)), strict=True):
        moved = data.draw(st.integers(0, max(0, min(int(counts[giver]) - 1, rows - width))))
        if taker != giver and counts[taker] + moved <= rows:
            counts[taker] += moved
            counts[giver] -= moved
    found = []
    for run in (cut_blocks, cut_blocks_naive):
        starts = torch.full((capacity + 1,), -7, dtype=torch.int32)
        requests = torch.full((capacity * width + 2,), -7, dtype=torch.int32)
        if not even:
            starts[0] = 0
            starts[1 : batch + 1] = counts.cumsum(0)
        if capacity:
            made = run(*whole, width, starts, requests, even=even)
            found.append((*made, starts, requests))
    if capacity:
        for ours, naive in zip(*found, strict=True):
            assert torch.equal(ours, naive)


def test_what_is_cut_is_told():
    tokens, positions, slots = blocks(2, 4, torch.int64)
    starts, requests = torch.tensor([0, 1, 4]).int(), torch.zeros(4, dtype=torch.int32)
    cut = cut_blocks(tokens, positions, slots, 2, starts, requests, even=False)
    assert cut.tokens.tolist() == [1, 8, 9, 10]
    assert cut.positions.tolist() == [1000, 1004, 1005, 1006]
    assert cut.sources.tolist() == [0, 4, 5, 6]
    assert cut.indices.tolist() == [0, 0, 0, 0, 1, 2, 3, 3]
    assert cut.kept.tolist() == [[1, -1, -1, -1], [8, 9, 10, -1]]
    assert requests.tolist() == [0, 1, 1, 1]


def test_faulty_arguments():
    tokens, positions, slots = blocks(2, 4, torch.int64)
    starts, requests = torch.zeros(3, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    for arguments, message in (
        ((tokens.int(), positions, slots, 2, starts, requests), "tokens must be int64"),
        ((tokens, positions[1:], slots, 2, starts, requests), r"positions must be contiguous \[8"),
        ((tokens, positions, slots, 5, starts, requests), "verify_length is 5: give 1 to 4"),
        ((tokens, positions, slots, 2, starts[:2], requests), r"starts must be int32 \[3\]"),
        ((tokens, positions, slots, 2, starts, requests[:3]), r"requests must be int32 \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cut_blocks(*arguments, even=True)
