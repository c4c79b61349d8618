"""Targets whose rotation depends on the length of a pass."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine, Request
from dflash_plugin.transformers.rotation import check_rotation
from tests.helpers.tiny import tiny_target

LIMIT = 48
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": LIMIT,
}
SHORT, LONG = [5, 6, 7], list(range(5, 25))


def target(rotation: dict[str, Any]) -> Any:
    positions = LIMIT if rotation is DYNAMIC else 4 * LIMIT
    return tiny_target("llama", max_position_embeddings=positions, rope_parameters=rotation)


@pytest.mark.parametrize("rotation", [DYNAMIC, LONGROPE])
def test_within_the_first_frequencies_a_request_is_served_as_alone(rotation):
    model = target(rotation)
    plain = model.generate(torch.tensor([SHORT]), max_new_tokens=20, do_sample=False)[0, 3:]
    engine = Engine(model, None, max_batch=2, max_length=LIMIT - 1)
    results = engine.generate([Request(SHORT, 20, stop_ids=()), Request(LONG, 20, stop_ids=())])
    assert results[0].tokens == plain.tolist()


@pytest.mark.parametrize("rotation", [DYNAMIC, LONGROPE])
def test_beyond_them_the_target_is_refused(rotation):
    with pytest.raises(DFlashError, match=f"longer than {LIMIT} positions.*lower it to 47 "):
        Engine(target(rotation), None, max_batch=2, max_length=LIMIT)


@given(
    kind=st.sampled_from(["default", "linear", "yarn", "llama3", "dynamic", "longrope"]),
    max_length=st.integers(1, 100),
    rows=st.integers(1, 16),
    is_nested=st.booleans(),
)
def test_what_is_refused(kind, max_length, rows, is_nested):
    rotation = {"rope_type": kind, "original_max_position_embeddings": LIMIT}
    given = {"full_attention": rotation, "sliding_attention": {"rope_type": "default"}}
    config = SimpleNamespace(
        model_type="made-up",
        max_position_embeddings=4 * LIMIT if kind == "longrope" else LIMIT,
        rope_parameters=given if is_nested else rotation,
    )
    if kind in ("dynamic", "longrope") and max_length + rows > LIMIT:
        with pytest.raises(DFlashError, match=f"max_length is {max_length}"):
            check_rotation(config, max_length, rows)
    else:
        check_rotation(config, max_length, rows)
