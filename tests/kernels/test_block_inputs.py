"""The rows of all blocks, made on the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.block_inputs import BlockInputs, block_inputs, block_inputs_naive
from tests.helpers.kernel_helpers import integers

pytestmark = pytest.mark.usefixtures("kernel_device")


@settings(max_examples=60, deadline=None)
@given(
    batch=st.sampled_from([0, 1, 5, 64]),
    block_size=st.sampled_from([1, 4, 13, 16]),
    page_size=st.sampled_from([1, 4, 16, 48]),
    indexed=st.booleans(),
    running=st.sampled_from([None, 0, 3, 100]),
    table_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_block_inputs(batch, block_size, page_size, indexed, running, table_dtype):
    longest = 200
    table = integers(0, 10_000, 70, longest // page_size + 5).to(table_dtype)
    arguments = (
        integers(0, 50_000, batch),
        integers(0, longest - block_size, batch),
        table,
        block_size,
        3,
    )
    options = {
        "page_size": page_size,
        "requests": integers(0, 70, batch, seed=1) if indexed else None,
        "running": None if running is None else torch.tensor([running], dtype=torch.int32),
    }
    out = block_inputs(*arguments, **options)
    reference = block_inputs_naive(*arguments, **options)
    buffers = BlockInputs(*(torch.full_like(part, 7) for part in out))
    again = block_inputs(*arguments, **options, out=buffers)
    for name, one, other, kept in zip(out._fields, out, reference, again, strict=True):
        assert torch.equal(one, other), name
        assert torch.equal(kept, other), name


def test_a_block_that_crosses_a_page():
    out = block_inputs(
        torch.tensor([9]), torch.tensor([6]), torch.tensor([[5, 2]]), 4, 3, page_size=8
    )
    assert out.tokens.tolist() == [[9, 3, 3, 3]]
    assert out.positions.tolist() == [[6, 7, 8, 9]]
    assert out.slots.tolist() == [[46, 47, 16, 17]]


def test_faulty_arguments():
    anchors, table = torch.arange(2), torch.zeros(2, 9).long()
    for arguments, options, message in (
        ((anchors.int(), anchors, table, 4, 3), {}, "anchors must be contiguous int64"),
        ((anchors, anchors[:1], table, 4, 3), {}, "anchor_positions must be"),
        ((anchors, anchors, table.T, 4, 3), {}, "page_table must be"),
        ((anchors, anchors, table, 0, 3), {}, "block_size is 0"),
        ((anchors, anchors, table, 4, 3), {"requests": anchors[:1]}, "requests must be"),
    ):
        with pytest.raises(ValueError, match=message):
            block_inputs(*arguments, **options)
