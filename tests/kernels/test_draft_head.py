"""The output head that chooses or draws tokens without writing logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from dflash_plugin.kernels.common import ProductTile
from dflash_plugin.kernels.draft_head import (
    Drawing,
    HeadChoice,
    draft_head,
    draft_head_naive,
    gumbel_naive,
    merge_heads,
)
from dflash_plugin.kernels.fp8_rows import quantize
from tests.helpers.kernel_helpers import DEVICE, DTYPES, error, integers, random

pytestmark = pytest.mark.usefixtures("kernel_device")
SMALL = ProductTile(16, 32, 32, 4, 2)


def drawing_of(rows: int, seed: int = 0) -> Drawing:
    """Every third row is greedy."""
    heat = 0.3 + random(rows, seed=seed).abs() if rows else random(0)
    heat = torch.where(torch.arange(rows) % 3 == 1, 0.0, heat)
    return Drawing(heat, integers(0, 1 << 62, rows, seed=1), integers(0, 1 << 40, rows, seed=2))


def same(out: HeadChoice, reference: HeadChoice, *, rounds: bool = False) -> None:
    """``rounds``: a GPU's sums of FP8 hold fewer bits, so that near tokens change places."""
    assert rounds or torch.equal(out.tokens, reference.tokens)
    assert out.tokens.dtype == torch.int64
    for name in ("scores", "log_sum_exp") if rounds else ("scores", "logits", "log_sum_exp"):
        bound = 2e-3 if rounds else 1e-5
        assert error(getattr(out, name), getattr(reference, name)) < bound, name


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 7, 17, 33]),
    vocabulary=st.sampled_from([5, 31, 97, 300]),
    width=st.sampled_from([16, 40, 72]),
    dtype=st.sampled_from(DTYPES),
    top_k=st.sampled_from([1, 2, 5, 16]),
    draws=st.booleans(),
    fp8=st.sampled_from(["neither", "weight", "both"]),
    tile=st.sampled_from([SMALL, None]),
    softcap=st.sampled_from([None, 3.0]),
)
def test_draft_head(rows, vocabulary, width, dtype, top_k, draws, fp8, tile, softcap):
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
        "drawing": drawing_of(rows) if draws else None,
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


@pytest.mark.parametrize("draws", [False, True])
def test_shards_merge_to_the_whole(draws):
    hidden, weight = random(17, 40), random(96, 40)
    drawing = drawing_of(17) if draws else None
    whole = draft_head(hidden, weight, top_k=3, drawing=drawing)
    shards = [
        draft_head(hidden, part, top_k=3, drawing=drawing, first_token=start)
        for start, part in ((0, weight[:40]), (40, weight[40:]))
    ]
    tokens, scores, logits = (
        torch.cat([shard[field] for shard in shards], dim=1) for field in range(3)
    )
    totals = torch.stack([shard.log_sum_exp for shard in shards], dim=1)
    same(merge_heads(HeadChoice(tokens, scores, logits, totals), 3), whole)


def test_drawn_tokens_have_the_heads_distribution():
    """χ² over 3,000 places, and that it would notice another temperature."""
    rows, vocabulary = 3000, 8
    hidden, weight = random(1, 16).expand(rows, 16).contiguous(), 0.5 * random(vocabulary, 16)
    heat = torch.full((rows,), 0.7)
    drawing = Drawing(heat, torch.full((rows,), 7), torch.arange(rows))
    tokens = draft_head(hidden, weight, drawing=drawing).tokens
    counts = torch.bincount(tokens[:, 0], minlength=vocabulary).cpu()

    def fit(temperature: float) -> float:
        shares = torch.softmax(hidden[0] @ weight.T / temperature, dim=-1).double().cpu()
        return float(chisquare(counts, rows * shares / shares.sum()).pvalue)

    assert fit(0.7) > 1e-3
    assert fit(1.0) < 1e-6


def test_noise_differs_by_seed_place_and_token():
    noise = gumbel_naive(torch.tensor([1, 2, 1]), torch.tensor([5, 5, 1 << 33]), torch.arange(4))
    assert noise.unique().numel() == 12


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
