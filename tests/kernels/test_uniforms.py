"""Noise in one launch against its twin."""

from __future__ import annotations

import pytest
import torch

from dflash_plugin.decoding.sampling import Stream
from dflash_plugin.kernels.uniforms import uniforms, uniforms_naive
from tests.helpers.kernel_helpers import integers

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize(("batch", "columns"), [(0, 3), (1, 1), (5, 7), (40, 15)])
def test_uniforms(batch, columns, stream):
    seed = integers(-(1 << 62), 1 << 62, batch)
    position = integers(0, 1 << 33, batch, columns)
    assert torch.equal(uniforms(seed, position, stream), uniforms_naive(seed, position, stream))


@pytest.mark.parametrize(
    ("seed", "position", "message"),
    [
        (torch.zeros(2).long(), torch.zeros(3, 4).long(), "seed must be"),
        (torch.zeros(2).int(), torch.zeros(2, 4).long(), "seed must be contiguous int64"),
        (torch.zeros(2).long(), torch.zeros(4, 2).long().T, "position must be contiguous"),
    ],
)
def test_faulty_arguments(seed, position, message):
    with pytest.raises(ValueError, match=message):
        uniforms(seed, position, Stream.DRAFT)
