"""The output head that chooses tokens, against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_plugin.kernels.common import ProductTile
from dflash_plugin.kernels.draft_head import (
    draft_head,
    draft_head_naive,
)
from dflash_plugin.kernels.fp8_rows import quantize
from dflash_plugin.kernels.vocab_topk import HeadChoice
from tests.helpers.kernel_helpers import DEVICE, DTYPES, error, random

pytestmark = pytest.mark.usefixtures("kernel_device")
SMALL = ProductTile(16, 32, 32, 4, 2)


def same(out: HeadChoice, reference: HeadChoice, *, rounds: bool = False) -> None:
    """``rounds``: a GPU's sums of FP8 hold fewer bits, so that near tokens change places."""
    assert rounds or torch.equal(out.tokens, reference.tokens)
    assert out.tokens.dtype == torch.int64
    for name in ("logits", "log_sum_exp"):
        bound = 2e-3 if rounds else 1e-5
        assert error(getattr(out, name), getattr(reference, name)) < bound, name


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 7, 17, 33]),
    vocabulary=st.sampled_from([5, 31, 97, 300]),
    width=st.sampled_from([16, 40, 72]),
    dtype=st.sampled_from(DTYPES),
    top_k=st.sampled_from([1, 2, 5, 16]),
    fp8=st.sampled_from(["neither", "weight", "both"]),
    tile=st.sampled_from([SMALL, None]),
    softcap=st.sampled_from([None, 3.0]),
)
def test_draft_head(rows, vocabulary, width, dtype, top_k, fp8, tile, softcap):
    assume(top_k <= vocabulary)
    hidden = random(rows, width, dtype=dtype, padding=3)
    weight = random(vocabulary, width, dtype=dtype, padding=5)
    hidden_scale, weight_scale = None, None
    if fp8 != "neither":
        weight, weight_scale = quantize(weight)
    if fp8 == "both":
        hidden, hidden_scale = quantize(hidden)
    options = {
        "hidden_scale": hidden_scale,
        "weight_scale": weight_scale,
        "top_k": top_k,
        "first_token": 1000,
        "scale": 0.4,
        "softcap": softcap,
    }
    out = draft_head(hidden, weight, tile=tile, **options)
    rounds = fp8 == "both" and DEVICE.type == "cuda"
    same(out, draft_head_naive(hidden, weight, **options), rounds=rounds)


def test_equal_logits_give_the_first_token():
    weight = torch.ones(70, 16)
    weight[::2] = 2.0
    out = draft_head(torch.ones(3, 16), weight, top_k=3, tile=SMALL)
    assert out.tokens.tolist() == [[0, 2, 4]] * 3


def test_what_is_no_number_gives_a_token_of_the_vocabulary():
    hidden = torch.full((2, 16), float("nan"))
    tokens = draft_head(hidden, random(70, 16), top_k=2, tile=SMALL).tokens
    assert ((tokens >= 0) & (tokens < 70)).all()


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(7, 15), {}, r"weight is \[7, 15\]"),
        (torch.zeros(7, 16).half(), {}, "float16 without a scale"),
        (torch.zeros(7, 16), {"top_k": 8}, "top_k is 8: give 1 to 7"),
        (torch.zeros(7, 16), {"weight_scale": torch.ones(6)}, "weight_scale must be"),
        (torch.zeros(7, 16), {"hidden_scale": torch.ones(3)}, "hidden_scale must be"),
        (torch.zeros(16, 7).T, {}, "contiguous"),
    ],
)
def test_faulty_arguments(weight: Tensor, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        draft_head(torch.zeros(2, 16), weight, **options)
