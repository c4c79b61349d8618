"""Fusion of target features without a copy that joins the layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.kernels.common import ProductTile
from dflash_plugin.kernels.fuse_features import (
    fuse_features,
    fuse_features_naive,
)
from tests.helpers.kernel_helpers import BOUND, DEVICE, DTYPES, error, integers, random
from tests.helpers.tiny import tiny_drafter

pytestmark = pytest.mark.usefixtures("kernel_device")
SMALL = ProductTile(16, 16, 16, 4, 2)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 17, 40]),
    layers=st.sampled_from([1, 3, 5]),
    width=st.sampled_from([16, 24, 40]),
    hidden=st.sampled_from([16, 33]),
    dtype=st.sampled_from(DTYPES),
    taken=st.sampled_from(["all", "some", "none", None]),
    gemma=st.booleans(),
    tile=st.sampled_from([SMALL, None]),
)
def test_fuse_features(rows, layers, width, hidden, dtype, taken, gemma, tile):
    features = [random(rows, width, dtype=dtype, padding=8, seed=seed) for seed in range(layers)]
    weight = random(hidden, layers * width, dtype=dtype, padding=8)
    norm = 1 + 0.2 * random(hidden).to(dtype)
    index = None
    if taken is not None:
        index = integers(0, max(1, rows), rows + 3) if rows else integers(0, 1, 0)
        if taken != "all":
            index[(torch.arange(len(index)) % 2 == 0) | (taken == "none")] = -1
    out = fuse_features(features, weight, norm, 1e-6, rows=index, gemma=gemma, tile=tile)
    reference = fuse_features_naive(features, weight, norm, 1e-6, rows=index, gemma=gemma)
    kept = slice(None) if index is None else index >= 0
    # Sums of another order are rounded once more, before the norm.
    assert error(out[kept], reference[kept]) < 4 * BOUND[dtype]


def test_fusion_is_the_cores():
    drafter = tiny_drafter().to(DEVICE)
    layers = [random(9, 32, seed=layer) for layer in range(2)]
    with torch.no_grad():
        expected = drafter.fuse(torch.cat(layers, dim=-1))
        norm = drafter.context_norm
        out = fuse_features(layers, drafter.fc.weight, norm.weight, norm.eps)
    assert error(out, expected) < 1e-5


def test_faulty_arguments():
    one = torch.zeros(2, 16)
    features, norm = [one, one], torch.ones(8)
    for layers, message in (
        ([], "no layer's features"),
        ([one, one.half()], "features of layer 1 are torch.float16"),
        ([one, torch.zeros(3, 16)], r"features of layer 1 are torch.float32 \[3, 16\]"),
        ([one.long()], "features are torch.int64"),
        ([torch.zeros(16, 2).T], "contiguous rows"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_features(layers, torch.zeros(8, 32), norm, 1e-6)
    for weight, rows, message in (
        (torch.zeros(8, 31), None, r"weight is \[8, 31\], not contiguous \[hidden, 32\]"),
        (torch.zeros(8, 32).half(), None, "weight is torch.float16"),
        (torch.zeros(8, 32), torch.zeros(2), "rows must be"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_features(features, weight, norm, 1e-6, rows=rows)
