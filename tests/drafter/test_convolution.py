"""The convolutions of a DFlash 2 drafter against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dflash_plugin.drafter.convolution import DynamicConvolution
from dflash_plugin.drafter.layers import TorchLayers
from dflash_plugin.kernels.grouped_convolution import convolve_naive
from tests.helpers.tiny import DFLASH2, tiny_config


def one_by_one(x: Tensor, dynamic: Tensor, base: Tensor, block_size: int) -> Tensor:
    """``convolve_naive`` of rows [T, H], a tap of a channel at a time, in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    (rows, width), (_, taps, groups) = x.shape, dynamic.shape
    for row in range(rows):
        for tap in range(min(taps, row % block_size + 1)):
            for channel in range(width):
                group = channel // (width // groups)
                weight = base[tap, channel].double() + dynamic[row, tap, group].double()
                out[row, channel] += weight * x[row - tap, channel]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "block_size", "taps", "groups"),
    [(8, 8, 2, 3), (12, 4, 3, 12), (11, 4, 4, 1), (5, 8, 2, 4), (6, 2, 5, 6), (3, 1, 2, 2)],
)
def test_rows_take_in_those_before_them_in_their_block(rows, block_size, taps, groups, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, dynamic, base = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, 12), (rows, taps, groups), (taps, 12))
    )
    found = convolve_naive(x, dynamic, base, block_size)
    expected = one_by_one(x, dynamic, base, block_size)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))
    assert torch.equal(convolve_naive(x, dynamic, base, torch.tensor(block_size)), found)
    # The rows of a batch are apart.
    batch = convolve_naive(x.expand(2, -1, -1), dynamic.expand(2, -1, -1, -1), base, block_size)
    assert torch.equal(batch, found.expand(2, -1, -1))


def test_a_new_convolution_whose_projection_gives_nothing_is_the_identity():
    made = DynamicConvolution(tiny_config(**DFLASH2), TorchLayers(), "layers.0.mlp_conv")
    projection = made.kernel_projection
    assert isinstance(projection, nn.Linear)
    nn.init.zeros_(projection.weight)
    x = torch.randn(2, 8, 32)
    assert torch.equal(made(x, lambda rows: 2 * rows, 4), 2 * x)
