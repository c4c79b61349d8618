"""Settings that stand in two places of a speculators file."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.errors import DFlashError
from tests.helpers.tiny import write_tiny

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
