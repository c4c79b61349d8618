"""Settings of a config.json that contradict each other are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from tests.helpers.tiny import write_tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FULL, SLIDING = "full_attention", "sliding_attention"
BY_KIND = {
    FULL: {"rope_theta": 1e6, "rope_type": "default"},
    SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
}
# Beside the settings' own values, others that a file may have.
TWICE = {
    "block_size": [4, 8, 16],
    "mask_token_id": [3, 5, 96],
    "rms_norm_eps": [1e-6, 1e-5],
    "hidden_act": ["silu", "gelu"],
    "sample_from_anchor": [False, True],
}


def read(directory: Path, **changes: Any) -> DrafterConfig:
    """The drafter of a checkpoint with changes to its config.json; None takes a key out."""
    path = directory / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return load_config(directory)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_setting_that_stands_twice_agrees_or_is_refused(data):
    name = data.draw(st.sampled_from(sorted(TWICE)))
    outside, inside = (data.draw(st.sampled_from(TWICE[name])) for _ in range(2))
    with TemporaryDirectory() as scratch:
        directory = write_tiny(Path(scratch) / "drafter")
        raw = json.loads((directory / "config.json").read_text())
        draft = {**raw["dflash_config"], name: inside}
        if outside == inside:
            assert getattr(read(directory, dflash_config=draft, **{name: outside}), name) == outside
            return
        both = f"dflash_config.{name} is {inside!r} and {name} is {outside!r}: leave out the one"
        with pytest.raises(DFlashError, match=re.escape(both)):
            read(directory, dflash_config=draft, **{name: outside})


@pytest.mark.parametrize(
    ("types", "theta"), [([SLIDING] * 2, 1e4), ([FULL] * 2, 1e6), ([SLIDING, FULL], None)]
)
def test_rotations_by_kind_of_layer_count_for_the_layers_that_there_are(tmp_path, types, theta):
    window = 8 if SLIDING in types else None
    changes = {
        "rope_theta": None, "rope_scaling": None, "rope_parameters": BY_KIND,
        "layer_types": types, "sliding_window": window, "use_sliding_window": bool(window),
    }  # fmt: skip
    directory = write_tiny(tmp_path)
    if theta is None:
        with pytest.raises(DFlashError, match="rope_parameters differ between"):
            read(directory, **changes)
    else:
        assert read(directory, **changes).rope.theta == theta


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [
        ({"rope_theta": 1e4, "rope_type": "default"}, YARN, "rope_type is 'default' and rope_sca"),
        ({"rope_theta": 1e4}, YARN, "rope_type is 'default' and rope_scaling.rope_type is 'yarn'"),
        ({"rope_theta": 1e4, **YARN}, {**YARN, "factor": 8.0}, r"factor is 4.0 and rope_scaling"),
        ({"rope_theta": 1e4, **YARN}, YARN, None),
        ({"rope_theta": 1e4}, {"type": "default"}, None),
    ],
)
def test_old_and_new_rotation_settings_agree_or_are_refused(tmp_path, new, old, message):
    changes = {"rope_theta": 1e4, "rope_parameters": new, "rope_scaling": old}
    directory = write_tiny(tmp_path)
    if message is None:
        assert read(directory, **changes).rope.type == new.get("rope_type", "default")
        return
    with pytest.raises(DFlashError, match=message):
        read(directory, **changes)


def test_a_base_that_stands_twice(tmp_path):
    with pytest.raises(DFlashError, match=r"rope_parameters\.rope_theta is 1000000\.0 and rope_th"):
        read(write_tiny(tmp_path), rope_theta=1e4, rope_parameters={"rope_theta": 1e6})


@pytest.mark.parametrize(
    ("changes", "draft", "message"),
    [
        ({"num_experts": 8}, {}, "num_experts is 8, of layers with a mixture of experts"),
        ({"kv_lora_rank": 512}, {}, r"kv_lora_rank is 512, of layers with latent attention"),
        ({}, {"attention_mode": "mla"}, r"dflash_config\.attention_mode is 'mla'"),
        ({"hidden_act": "swish9"}, {}, "hidden_act is 'swish9'"),
        ({"hidden_act": "silu", "hidden_activation": "gelu"}, {}, "hidden_activation is 'gelu'"),
        (
            {"architectures": ["DFlash2DraftModel"], "selector_vocab_size": 64},
            {},
            "selector_vocab_size is 64 and vocab_size 97",
        ),
    ],
)
def test_what_would_change_the_arithmetic_unread_is_refused(tmp_path, changes, draft, message):
    directory = write_tiny(tmp_path)
    raw = json.loads((directory / "config.json").read_text())
    with pytest.raises(DFlashError, match=message):
        read(directory, dflash_config={**raw["dflash_config"], **draft}, **changes)


def test_the_activations_other_name(tmp_path):
    config = read(write_tiny(tmp_path), hidden_act=None, hidden_activation="gelu_pytorch_tanh")
    assert config.hidden_act == "gelu_pytorch_tanh"


def test_the_targets_depth_by_torchspecs_name(tmp_path):
    """Its num_target_layers counts the layers that are read."""
    directory = write_tiny(tmp_path)
    taps = len(load_config(directory).target_layer_ids)
    config = read(directory, num_target_layers=taps, target_num_hidden_layers=36)
    assert config.num_target_layers == 36
    with pytest.raises(DFlashError, match="out of range: the target has num_target_layers 1"):
        read(directory, num_target_layers=1, target_num_hidden_layers=None)


def test_keys_of_other_layers_that_are_off_are_read_over(tmp_path):
    directory = write_tiny(tmp_path)
    wanted = load_config(directory)
    assert read(directory, num_experts=0, kv_lora_rank=None) == wanted


@pytest.mark.parametrize("says", [False, True])
def test_sliding_layers_that_leave_the_dialect_open_are_told_in_every_program(
    tmp_path, caplog, says
):
    directory = write_tiny(tmp_path, layers=({"sliding_window": 8}, {}))
    for _ in range(2):
        assert read(directory, is_causal=False if says else None).layers[0].causal is not says
        load_config(directory, "specforge")
    told = [record for record in caplog.records if "read it with --dialect specforge" in
            record.getMessage()]  # fmt: skip
    # Once for each drafter, and not where a dialect is given.
    assert len(told) == (0 if says else 1)
    assert all(str(directory.resolve()) in record.getMessage() for record in told)
