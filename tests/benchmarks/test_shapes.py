"""The shapes that the serving benchmarks run with dummy weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from serving_common import SHAPES, drafter_of


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_target_and_a_drafter_for_it(tmp_path, name):
    shape = SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(shape.target))
    target = AutoConfig.from_pretrained(tmp_path)
    drafter = drafter_of(shape)
    assert drafter.num_target_layers == target.num_hidden_layers
    assert max(drafter.target_layer_ids) < target.num_hidden_layers
    assert drafter.vocab_size == target.vocab_size > drafter.mask_token_id
    assert [layer.sliding_window for layer in drafter.layers] == list(shape.windows)


def test_a_hybrid_shape_has_recurrent_layers_and_a_drafter_with_heads_of_its_own():
    shape = SHAPES["qwen3.5-9b"]
    assert shape.target["layer_types"].count("linear_attention") == 24
    drafter = drafter_of(shape)
    assert (drafter.num_key_value_heads, drafter.head_dim) == (8, 128)
    assert shape.target["num_key_value_heads"] == 4
