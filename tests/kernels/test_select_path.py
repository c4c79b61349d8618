"""The selector's walk in one launch against its twin, and drawn tokens against their shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from dflash_plugin.decoding.draft_sampling import sharpen
from dflash_plugin.decoding.sampling import SamplingTensors, probabilities
from dflash_plugin.kernels.select_path import Limits, Path, select_path, select_path_naive
from tests.helpers.kernel_helpers import DTYPES, error, integers, random

pytestmark = pytest.mark.usefixtures("kernel_device")


def arguments_of(
    batch: int, count: int, choices: int, rank: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """A vocabulary of 40, of whose tokens each position has different ones."""
    order = random(batch, count, 40, seed=1).argsort(dim=-1)
    return [
        order[..., :choices].contiguous(),
        3 * random(batch, count, choices),
        random(batch, count, rank, dtype=dtype),
        integers(0, 40, 2 * batch)[::2],
        random(40, rank, dtype=dtype, padding=3),
        random(40, rank, dtype=dtype, padding=5),
    ]


def temperature_of(batch: int) -> Tensor:
    """Every third request is greedy."""
    return torch.where(torch.arange(batch) % 3 == 1, 0.0, 0.3 + random(batch).abs())


def same(out: Path, reference: Path) -> None:
    assert torch.equal(out.tokens, reference.tokens)
    assert out.tokens.dtype == torch.int64
    assert error(out.scores, reference.scores) < 1e-5
    torch.testing.assert_close(out.confidence, reference.confidence, atol=1e-4, rtol=1e-5)
    assert (out.probs is None) == (reference.probs is None)
    if out.probs is not None and reference.probs is not None:
        torch.testing.assert_close(out.probs, reference.probs, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.sampled_from([0, 1, 4]),
    count=st.sampled_from([1, 3, 7, 15, 18]),
    choices=st.sampled_from([1, 2, 5, 16, 19, 32]),
    rank=st.sampled_from([1, 6, 32, 40]),
    dtype=st.sampled_from(DTYPES),
    noise=st.sampled_from([None, torch.float32, torch.float64]),
)
def test_select_path(batch, count, choices, rank, dtype, noise):
    arguments = arguments_of(batch, count, choices, rank, dtype)
    if noise is not None:
        u = random(batch, count, seed=3).abs() % 1.0
        arguments += [temperature_of(batch), u.to(noise)]
    same(select_path(*arguments), select_path_naive(*arguments))


def limits_of(batch: int, count: int) -> Limits:
    """Different limits of each request, some of them off, and factors of each draft."""
    request = torch.arange(batch)
    return Limits(
        torch.tensor([0, 3, 2, 40])[request % 4],
        torch.tensor([1.0, 0.7, 1.0, 0.9, 0.3])[request % 5],
        torch.tensor([0.0, 0.0, 0.2])[request % 3],
        torch.tensor([1.0, 0.5, 0.0])[(request[:, None] + torch.arange(count)) % 3].contiguous(),
    )


@settings(max_examples=8, deadline=None)
@given(
    batch=st.sampled_from([1, 6]),
    count=st.sampled_from([1, 7]),
    choices=st.sampled_from([1, 5, 16, 19]),
    has_factors=st.booleans(),
)
def test_limits_of_requests(batch, count, choices, has_factors):
    arguments = arguments_of(batch, count, choices, 6)
    limits = limits_of(batch, count)
    arguments += [
        temperature_of(batch),
        random(batch, count, seed=3).abs() % 1.0,
        limits if has_factors else limits._replace(factors=None),
    ]
    same(select_path(*arguments), select_path_naive(*arguments))


def test_limits_are_those_of_the_target():
    """The first position's distribution is the core's of its scores, sharpened afterwards."""
    batch, count = 6, 3
    limits, temperature = limits_of(batch, count), temperature_of(batch)
    u = random(batch, count, seed=3).abs() % 1.0
    path = select_path_naive(*arguments_of(batch, count, 8, 6), temperature, u, limits)
    seeds = torch.zeros(batch, dtype=torch.int64)
    params = SamplingTensors(temperature, *limits[:3], seeds)
    expected = sharpen(probabilities(path.scores, params), limits.factors)
    torch.testing.assert_close(path.probs, expected)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_what_has_no_probability_is_not_drawn(u):
    """Of a row whose ends are beyond what float32 can hold."""
    arguments = arguments_of(1, 3, 5, 6)
    arguments[1] = torch.tensor([-1e4, 0.0, 1.0, 0.5, -1e4]).expand(1, 3, 5).contiguous()
    noise = torch.full((1, 3), u, dtype=torch.float64)
    path = select_path(*arguments, torch.ones(1), noise)
    assert path.probs is not None
    shares = path.probs.gather(
        -1, (arguments[0] == path.tokens[..., None]).long().argmax(-1)[..., None]
    )
    assert (shares > 0).all()
    same(path, select_path_naive(*arguments, torch.ones(1), noise))


def test_equal_scores_give_the_first_candidate():
    arguments = arguments_of(2, 3, 5, 6)
    arguments[1].zero_()
    arguments[2].zero_()
    path = select_path(*arguments)
    assert torch.equal(path.tokens, arguments[0][..., 0])
    torch.testing.assert_close(path.confidence, torch.full((2, 3), 0.25).log())


@pytest.mark.parametrize("draws", [False, True])
def test_what_is_no_number_gives_a_candidate(draws):
    arguments = arguments_of(2, 3, 5, 6)
    arguments[2][:, 1:] = float("nan")
    noise = [torch.ones(2), torch.full((2, 3), 0.5)] if draws else []
    path = select_path(*arguments, *noise)
    assert (path.tokens[..., None] == arguments[0]).any(-1).all()


def test_drawn_tokens_have_the_shares_that_come_back():
    """χ² over 2,000 requests that differ in their noise alone."""
    batch, count, choices = 2000, 3, 4
    arguments = arguments_of(1, count, choices, 6)
    for i, part in enumerate(arguments[:4]):
        arguments[i] = part.expand(batch, *part.shape[1:]).contiguous()
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(batch, count, generator=generator, device="cpu").to(arguments[1].device)
    path = select_path(*arguments, torch.full((batch,), 0.7), u)
    assert path.probs is not None
    index = (arguments[0] == path.tokens[..., None]).long().argmax(-1)
    for draft in range(count):
        counts = torch.bincount(index[:, draft], minlength=choices).cpu()
        # Shares depend on the path to here; their sum over requests is what is expected.
        expected = path.probs[:, draft].double().sum(0).cpu()
        assert chisquare(counts, expected * batch / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 3, 5).int(), "candidates are torch.int32"),
        (0, torch.zeros(2, 0, 5).long(), "at least one position"),
        (0, torch.zeros(2, 3, 33).long(), "1 to 32 candidates"),
        (1, torch.zeros(2, 3, 4), "logits must be"),
        (1, torch.zeros(2, 5, 3).mT, "must be contiguous"),
        (2, torch.zeros(2, 3, 7), "gates must be"),
        (3, torch.zeros(2).int(), "anchors must be int64"),
        (4, torch.zeros(6, 40).T, "contiguous rows"),
        (5, torch.zeros(40, 7), "predecessors and successors"),
        (6, None, "go together"),
        (6, torch.ones(2).double(), "temperature must be float32"),
        (7, torch.zeros(2, 4), r"u must be \[2, 3\]"),
    ],
)
def test_faulty_arguments(index, value, message):
    arguments = [*arguments_of(2, 3, 5, 6), torch.ones(2), torch.zeros(2, 3)]
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        select_path(*arguments)


def test_the_twin_takes_any_number_of_candidates():
    arguments = arguments_of(2, 3, 35, 6)
    assert select_path_naive(*arguments).scores.shape == (2, 3, 35)
