"""Noise in one launch against its twin."""

from __future__ import annotations

import pytest
import torch

from dflash_plugin.kernels.uniforms import Stream, uniforms, uniforms_naive
from tests.helpers.kernel_helpers import integers

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize(("batch", "columns"), [(0, 3), (1, 1), (5, 7), (40, 15)])
def test_uniforms(batch, columns, stream):
    seed = integers(-(1 << 62), 1 << 62, batch)
    position = integers(0, 1 << 33, batch, columns)
    noise = uniforms(seed, position, stream)
    assert torch.equal(noise, uniforms_naive(seed, position, stream))
    assert ((noise >= 0) & (noise < 1)).all()


def test_strides_do_not_matter():
    seed, position = integers(0, 1 << 62, 10)[::2], integers(0, 1 << 33, 7, 10).T[::2, 1:]
    expected = uniforms_naive(seed, position, Stream.NEXT)
    assert torch.equal(uniforms(seed, position, Stream.NEXT), expected)


@pytest.mark.parametrize(
    ("seed", "position", "message"),
    [
        (torch.zeros(2).long(), torch.zeros(3, 4).long(), "seed must be"),
        (torch.zeros(2).int(), torch.zeros(2, 4).long(), "seed must be int64"),
        (torch.zeros(2).long(), torch.zeros(2, 4).int(), "position must be int64"),
    ],
)
def test_faulty_arguments(seed, position, message):
    with pytest.raises(ValueError, match=message):
        uniforms(seed, position, Stream.DRAFT)
