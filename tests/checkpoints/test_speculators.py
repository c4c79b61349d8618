"""Speculators files: settings that stand in two places, and DFlash 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.checkpoints.dialects import suggested_drafts
from dflash_plugin.checkpoints.inspection import inspect_checkpoint
from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.errors import DFlashError
from tests.helpers.tiny import DFLASH2, write_tiny

WINDOWS = {"layers": ({"sliding_window": 8, "causal": True}, {}), "window_from": "anchor"}
NAMES = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")


@settings(max_examples=40, deadline=None)
@given(outside=st.sets(st.sampled_from(NAMES)), inside=st.sets(st.sampled_from(NAMES)))
def test_windows_may_stand_outside_of_the_layers_section(outside, inside):
    with TemporaryDirectory() as scratch:
        directory = write_tiny(Path(scratch) / "drafter", "speculators", **WINDOWS)
        path = directory / "config.json"
        raw = json.loads(path.read_text())
        wanted, layer = load_config(directory), raw["transformer_layer_config"]
        moved = {name: layer[name] for name in outside}
        left = {name: value for name, value in layer.items() if name not in outside - inside}
        path.write_text(json.dumps({**raw, **moved, "transformer_layer_config": left}))
        assert load_config(directory) == wanted


@pytest.mark.parametrize(
    ("name", "other"), [("sliding_window", 16), ("layer_types", ["full_attention"] * 2)]
)
def test_windows_that_contradict_each_other_are_refused_by_name(tmp_path, name: str, other: Any):
    directory = write_tiny(tmp_path, "speculators", **WINDOWS)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: other}))
    with pytest.raises(DFlashError, match=rf"{name} is .* and transformer_layer_config\.{name} is"):
        load_config(directory)


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("says", [None, True, False])
def test_windows_that_leave_causality_open_are_a_warning(tmp_path, caplog, windows, says):
    directory = write_tiny(tmp_path, "speculators", **(WINDOWS if windows else {}))
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    del raw["sliding_window_non_causal"]
    if says is not None:
        raw["sliding_window_non_causal"] = says
    path.write_text(json.dumps(raw))
    config = load_config(directory)
    if windows:
        assert config.layers[0].causal is (says is not True)
    found = [f.subject for f in inspect_checkpoint(directory).findings if f.level == "warning"]
    is_open = windows and says is None
    assert ("sliding_window_non_causal" in found) == is_open
    assert ("no sliding_window_non_causal: they are read as causal" in caplog.text) == is_open


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("says", [None, True, False])
def test_a_dflash2_drafter_reads_as_in_z_labs_layout(tmp_path, nested, says):
    layers = ({"sliding_window": 64},) * 2
    wanted = load_checkpoint(write_tiny(tmp_path / "twin", **DFLASH2, layers=layers))
    directory = write_tiny(tmp_path / "other", "speculators", layers=layers, window_from="anchor")
    keys = {
        "conv_kernel_size": wanted.config.convolution.kernel_size,
        "conv_group_size": wanted.config.convolution.group_size,
        "selector_rank": wanted.config.selector.rank,
        "selector_top_k": wanted.config.selector.top_k,
    }
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"speculators_model_type": "dflash2", "architectures": ["DFlash2DraftModel"]}
    raw |= {"dflash2_config": keys} if nested else keys
    # Windows are not causal where the file does not say.
    del raw["sliding_window_non_causal"]
    if says is not None:
        raw["sliding_window_non_causal"] = says
    (directory / "config.json").write_text(json.dumps(raw))
    shutil.copy(tmp_path / "twin" / "model.safetensors", directory)
    found = load_checkpoint(directory)
    assert found.tensors.keys() == wanted.tensors.keys()
    config = found.config
    assert (config.convolution, config.selector) == (
        wanted.config.convolution, wanted.config.selector,
    )  # fmt: skip
    assert [layer.causal for layer in config.layers] == [says is False] * 2
    assert config.target_layer_ids == wanted.config.target_layer_ids


def test_keys_of_dflash2_in_a_dflash_file_are_refused_by_name(tmp_path):
    directory = write_tiny(tmp_path, "speculators")
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "selector_rank": 8}))
    with pytest.raises(DFlashError, match=r"selector_rank is 8, of a DFlash 2 drafter.*'dflash2'"):
        load_config(directory)


def test_experts_beside_the_layers_section_are_refused_by_name(tmp_path):
    directory = write_tiny(tmp_path, "speculators")
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 8}))
    with pytest.raises(DFlashError, match="num_experts is 8, of layers with a mixture of experts"):
        load_config(directory)


@pytest.mark.parametrize(
    ("methods", "suggested"),
    [
        ([{"speculative_tokens": 8}], 8),
        ([{"speculative_tokens": 5}, {"speculative_tokens": 8}], 5),
        ([{"speculative_tokens": None}], None),
        ([{}], None),
        ([], None),
        (None, None),
        ("greedy", None),
    ],
)
def test_the_number_of_drafts_that_a_file_suggests(methods, suggested):
    raw = {"speculators_config": {"proposal_methods": methods}}
    assert suggested_drafts(raw) == suggested


def test_a_file_without_a_proposal_suggests_nothing():
    assert suggested_drafts({}) is suggested_drafts({"speculators_config": None}) is None
