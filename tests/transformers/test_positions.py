"""How far a target's positions reach."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine, Request
from dflash_plugin.transformers.positions import check_positions, position_limit
from tests.helpers.tiny import tiny_drafter, tiny_target

LIMIT = 40
PROMPT = list(range(5, 25))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_request_may_fill_all_positions_with_drafts_beyond(kind):
    target = tiny_target(kind, max_position_embeddings=LIMIT)
    count = LIMIT - len(PROMPT)
    expected = target.generate(
        torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, eos_token_id=None
    )[0, len(PROMPT) :].tolist()
    for drafter in (None, tiny_drafter()):
        engine = Engine(target, drafter, max_length=64)
        assert engine.generate([Request(PROMPT, count, stop_ids=())])[0].tokens == expected


def test_a_longer_request_is_told_before_anything_runs():
    target = tiny_target("gpt2", max_position_embeddings=LIMIT)
    engine = Engine(target, tiny_drafter(), max_batch=2, max_length=64)
    seen: list[int] = []
    with pytest.raises(DFlashError, match=r"request 1 needs 20 prompt \+ 21 .* has 40 positions"):
        engine.generate(
            [Request(PROMPT, 4), Request(PROMPT, 21)], lambda index, tokens: seen.append(index)
        )
    assert seen == []


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({}, None),
        ({"max_position_embeddings": 64}, 64),
        (
            {
                "max_position_embeddings": 40960,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
    ],
)
def test_the_limit_counts_what_a_rotation_is_stretched_to(values, limit):
    assert position_limit(SimpleNamespace(**values)) == limit


@given(
    max_length=st.integers(1, 100),
    rows=st.integers(1, 16),
    chunk=st.none() | st.integers(1, 120),
    floor=st.none() | st.integers(2, 120),
)
def test_attention_that_changes_within_the_lengths_is_refused(max_length, rows, chunk, floor):
    config = SimpleNamespace(
        model_type="made-up",
        layer_types=["full_attention"] if chunk is None else ["chunked_attention"],
        attention_chunk_size=chunk,
        attn_temperature_tuning=floor is not None,
        floor_scale=floor,
    )
    last = max_length + rows - 1
    changes_chunk = chunk is not None and last // chunk > 0
    scales = floor is not None and (last + 1) // floor > 0
    if changes_chunk or scales:
        with pytest.raises(DFlashError, match=f"but max_length is {max_length}: lower it"):
            check_positions(config, max_length, rows)
    else:
        check_positions(config, max_length, rows)
