"""Probabilities against Transformers' warpers, and the counter-based noise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dflash_plugin.decoding.sampling import (
    SamplingParams,
    SamplingTensors,
    probabilities,
)
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream, philox, uniforms

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=60)
@given(
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_probabilities_are_those_of_transformers_warpers(temperature, top_k, top_p, min_p, seed):
    logits = 3 * torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(min(top_k, 17)))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    expected = torch.softmax(warpers(None, logits.view(6, 17)), dim=-1).view(2, 3, 17)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = probabilities(logits, SamplingTensors.build([params] * 2, CPU))
    # A token exactly on the nucleus' edge can fall either way by rounding.
    if bool(((found > 0) == (expected > 0)).all()):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    else:
        assert int(((found > 0) != (expected > 0)).sum()) <= 6
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))


def test_greedy_rows_put_everything_on_the_largest_logit():
    logits = torch.tensor([[[0.0, 2.0, 2.0, 1.0]]])
    params = SamplingTensors.build([SamplingParams(temperature=0.0, top_k=3)], CPU)
    assert probabilities(logits, params).tolist() == [[[0.0, 1.0, 0.0, 0.0]]]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 9e-7])
def test_temperatures_that_would_overflow_are_greedy(temperature):
    logits = torch.tensor([[[0.0, 30.0, 29.0, -30.0]]])
    params = SamplingTensors.build([SamplingParams(temperature=temperature)], CPU)
    assert probabilities(logits, params).tolist() == [[[0.0, 1.0, 0.0, 0.0]]]


def test_philox_known_answers():
    """The published test vectors of Random123 for philox4x32-10."""
    vectors = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in vectors:
        out = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert [int(x) for x in out] == expected


def test_noise_depends_on_request_position_and_stream_alone():
    seed = torch.tensor([5, 9])
    places = torch.arange(6).expand(2, -1)
    whole = uniforms(seed, places, Stream.NEXT)
    assert torch.equal(whole[1:, 3:], uniforms(seed[1:], places[1:, 3:], Stream.NEXT))
    assert not torch.equal(whole, uniforms(seed, places, Stream.ACCEPT))
    assert not torch.equal(whole[0], whole[1])
    many = uniforms(torch.tensor([1]), torch.arange(100_000)[None], Stream.DRAFT)
    assert 0 <= float(many.min()) < float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.005


def test_sample_never_draws_a_token_of_probability_zero():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(5, -1)
    drawn = sample(probs, torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_parameters_out_of_range_are_refused(values, named):
    with pytest.raises(DFlashError, match=named):
        SamplingParams(**values)
