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
    block=st.sampled_from([1, 7, 16]),
    padded=st.integers(0, 3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    data=st.data(),
)
def test_cut_blocks(batch, block, padded, dtype, data):
    counts = torch.tensor([data.draw(st.integers(1, block)) for _ in range(batch)]).long()
    verified, found = int(counts.sum()), []
    rows = data.draw(st.integers(verified, batch * block))
    for run in (cut_blocks, cut_blocks_naive):
        starts = torch.full((batch + 1 + padded,), verified, dtype=torch.int32)
        starts[0] = 0
        starts[1 : batch + 1] = counts.cumsum(0)
        requests = torch.full((rows + 2,), -7, dtype=torch.int32)
        made = run(*blocks(batch, block, dtype), rows, starts, requests)
        found.append((*made, starts, requests))
    for ours, naive in zip(*found, strict=True):
        assert torch.equal(ours, naive)


def test_what_is_cut_is_told():
    tokens, positions, slots = blocks(2, 4, torch.int64)
    starts, requests = torch.tensor([0, 1, 4]).int(), torch.zeros(4, dtype=torch.int32)
    cut = cut_blocks(tokens, positions, slots, 4, starts, requests)
    assert cut.tokens.tolist() == [1, 8, 9, 10]
    assert cut.positions.tolist() == [1000, 1004, 1005, 1006]
    assert cut.sources.tolist() == [0, 4, 5, 6]
    assert cut.indices.tolist() == [0, 0, 0, 0, 1, 2, 3, 3]
    assert cut.kept.tolist() == [[1, -1, -1, -1], [8, 9, 10, -1]]
    assert requests.tolist() == [0, 1, 1, 1]


def test_padding_goes_to_the_slot_that_nothing_reads():
    tokens, positions, slots = blocks(2, 4, torch.int64)
    starts, requests = torch.tensor([0, 1, 2]).int(), torch.full((5,), -7, dtype=torch.int32)
    cut = cut_blocks(tokens, positions, slots, 5, starts, requests)
    assert cut.tokens.tolist() == [1, 8, 0, 0, 0]
    assert cut.slots.tolist() == [7, 3, 0, 0, 0]
    assert requests.tolist() == [0, 1, 1, 1, 1]


def test_faulty_arguments():
    tokens, positions, slots = blocks(2, 4, torch.int64)
    starts, requests = torch.zeros(3, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    for arguments, message in (
        ((tokens.int(), positions, slots, 4, starts, requests), "tokens must be int64"),
        ((tokens, positions[1:], slots, 4, starts, requests), r"positions must be contiguous \[8"),
        ((tokens, positions, slots, 1, starts, requests), "rows is 1: give 2 or more"),
        ((tokens, positions, slots, 4, starts[:2], requests), r"starts must be int32 \[3\]"),
        ((tokens, positions, slots, 4, starts, requests[:3]), r"requests must be int32 \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cut_blocks(*arguments)
