"""Open Spec Config reads as the same drafter in speculators' own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.errors import DFlashError
from tests.helpers.tiny import write_tiny

WINDOWS = {"layers": ({"sliding_window": 8, "causal": True}, {}), "window_from": "anchor"}
FREE = {"layers": ({"sliding_window": 8}, {}), "window_from": "anchor"}


def rewritten(directory: Path, start: int = 0, **changes: Any) -> Path:
    """A speculators checkpoint with its config.json in the other layout."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    block, anchor = raw["block_size"], raw["sample_from_anchor"]
    speculative = {
        "method": "dflash",
        "verifier": "some/target",
        "speculative_tokens": block - (not anchor),
        "target_layer_start_idx": start,
        "target_layer_ids": [i - 1 + start for i in raw["aux_hidden_state_layer_ids"]],
        "sample_from_anchor": anchor,
        "mask_token_id": raw["mask_token_id"],
        "sliding_window_non_causal": raw["sliding_window_non_causal"],
        "target_hidden_size": raw.get("target_hidden_size"),
    }
    version = changes.pop("open_spec_config_version", "0.0.0")
    made = {
        "open_spec_config_version": version,
        "architectures": ["DflashDraftModel"],
        "speculative_config": {**speculative, **changes},
        **raw["transformer_layer_config"],
        "dtype": raw["dtype"],
    }
    path.write_text(json.dumps(made))
    return directory


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        WINDOWS,
        {**FREE, "sample_from_anchor": True},
        {"draft_vocab_size": 24, "own_head": True},
        {"rope": {"theta": 5e5, "type": "linear", "parameters": {"factor": 2.0}}},
    ],
)
def test_the_same_drafter(tmp_path, start, changes):
    directory = write_tiny(tmp_path, "speculators", **changes)
    wanted = load_checkpoint(directory)
    found = load_checkpoint(rewritten(directory, start))
    assert found.config == wanted.config
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in found.tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"open_spec_config_version": "1.0.0"}, r"open_spec_config_version is '1\.0\.0'"),
        ({"method": "eagle3"}, r"speculative_config\.method is 'eagle3'"),
        ({"speculative_tokens": None}, "speculative_tokens is missing"),
        ({"target_layer_start_idx": 2}, "target_layer_start_idx is 2: .* from 0 or from 1"),
        ({"target_layer_start_idx": 1}, r"target_layer_ids is \[0.*before target_layer_start_idx"),
        ({"dflash_config": {"mask_token_id": 5}}, r"dflash_config\.mask_token_id is 5: leave out"),
        ({"draft_vocab_size": 24}, "draft_vocab_size is 24 but there is no lm_head"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, changes, message):
    directory = rewritten(write_tiny(tmp_path, "speculators", target_layer_ids=(0, 2)), **changes)
    with pytest.raises(DFlashError, match=message):
        load_config(directory)


def test_how_a_block_drafts_in_a_section_of_its_own(tmp_path):
    """Drafts of the schema nest what later ones have beside the target layers."""
    directory = rewritten(write_tiny(tmp_path, "speculators", **FREE))
    wanted, path = load_config(directory), directory / "config.json"
    raw = json.loads(path.read_text())
    speculative = raw["speculative_config"]
    names = ("sample_from_anchor", "mask_token_id", "sliding_window_non_causal")
    speculative["dflash_config"] = {name: speculative.pop(name) for name in names}
    path.write_text(json.dumps(raw))
    assert load_config(directory) == wanted
    assert not wanted.layers[0].causal


def test_the_width_of_the_targets_layers_at_the_top_level(tmp_path):
    """Where speculators writes it."""
    directory = rewritten(write_tiny(tmp_path, "speculators", target_hidden_size=48))
    wanted, path = load_config(directory), directory / "config.json"
    raw = json.loads(path.read_text())
    raw["target_hidden_size"] = raw["speculative_config"].pop("target_hidden_size")
    path.write_text(json.dumps(raw))
    assert load_config(directory) == wanted
    assert wanted.target_hidden_size == 48
