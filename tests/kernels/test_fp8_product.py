"""Few FP8 rows times many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.common import ProductTile
from dflash_plugin.kernels.fp8_product import best_tile, fp8_product, fp8_product_naive
from dflash_plugin.kernels.fp8_rows import FP8, Fp8Rows, quantize
from tests.helpers.kernel_helpers import BOUND, DEVICE, DTYPES, random

pytestmark = pytest.mark.usefixtures("kernel_device")
SMALL = ProductTile(16, 16, 32, 4, 2)
# A GPU's sums of FP8 hold fewer bits of what is summed.
BITS = 1e-3 if DEVICE.type == "cuda" else 0.0


@settings(max_examples=50, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 17, 64, 130]),
    columns=st.sampled_from([1, 16, 33]),
    width=st.sampled_from([32, 40, 96, 300]),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([SMALL, None]),
)
def test_fp8_product(rows, columns, width, dtype, tile):
    x, weight = quantize(random(rows, width)), quantize(random(columns, width, seed=1))
    out = fp8_product(x, weight, dtype, tile=tile)
    reference = fp8_product_naive(x, weight, dtype)
    summed = fp8_product_naive(*(whole._replace(values=whole.values.float().abs().to(FP8))
                                 for whole in (x, weight)), dtype)  # fmt: skip
    bound = BOUND[dtype] * reference.double().norm() + BITS * summed.double().norm()
    assert out.shape == reference.shape
    assert out.dtype == reference.dtype
    assert (out.double() - reference.double()).norm() <= bound


def test_faulty_arguments():
    x, weight = quantize(torch.ones(2, 32)), quantize(torch.ones(8, 32))
    for arguments, message in (
        ((quantize(torch.ones(2, 31)), weight), "weight's rows are 32 wide, x's 31"),
        ((x, Fp8Rows(weight.values.float(), weight.scales)), "weight's values must be"),
        ((Fp8Rows(x.values, x.scales[:1]), weight), r"x's scales must be float32 \[2\]"),
        ((Fp8Rows(x.values[:, ::2], x.scales), weight), "x's values must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_product(*arguments, torch.float32)


@pytest.mark.parametrize(
    ("rows", "columns", "programs"),
    [(16, 4096, 64), (64, 4096, 128), (128, 4096, 128), (256, 4096, 128), (128, 6144, 96)],
)
def test_a_weight_of_few_columns_keeps_a_gpu_busy(monkeypatch, rows, columns, programs):
    monkeypatch.setattr("dflash_plugin.kernels.fp8_product.multiprocessors", lambda device: 132)
    tile = best_tile(rows, columns, DEVICE)
    assert -(-rows // tile.rows) * -(-columns // tile.columns) == programs


@pytest.mark.parametrize(("rows", "columns"), [(128, 24576), (256, 6144), (257, 4096)])
def test_many_rows_are_the_librarys(monkeypatch, rows, columns):
    monkeypatch.setattr("dflash_plugin.kernels.fp8_product.multiprocessors", lambda device: 132)
    assert best_tile(rows, columns, DEVICE) is None
