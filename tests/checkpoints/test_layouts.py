"""Meta's assistant drafters, Poolside's for Laguna, and ids that count boundaries."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash_plugin.checkpoints.convert import convert
from dflash_plugin.checkpoints.dialects import is_dflash, read_config, write_config
from dflash_plugin.checkpoints.inspection import inspect_checkpoint
from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import load_drafter
from tests.helpers.layouts import LAGUNA, write_laguna, write_muse
from tests.helpers.tiny import tiny_config, tiny_target, tiny_tensors, write_target, write_tiny

WINDOW = {"sliding_window": 8}
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40]


def edited(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def test_an_assistant_drafts_with_the_targets_vocabulary_and_windows_that_are_not_causal(tmp_path):
    target = tiny_target()
    twin = write_tiny(tmp_path / "twin", layers=(WINDOW, WINDOW))
    drafter = load_drafter(write_muse(tmp_path / "muse"), target)
    assert drafter.config.vocab_size == 97
    assert [(layer.sliding_window, layer.causal) for layer in drafter.config.layers] == [
        (8, False),
        (8, False),
    ]
    found, wanted = (answer(one, target, PROMPT) for one in (drafter, load_drafter(twin, target)))
    assert found == wanted


def test_an_assistant_fits_its_target(tmp_path):
    target = write_target(tmp_path / "target")
    report = inspect_checkpoint(write_muse(tmp_path / "muse"), target)
    assert report.fits
    said = {(one.level, one.subject): one.message for one in report.findings}
    assert "with the target's" in said["note", "vocab_size"]
    assert ("warning", "is_causal") not in said
    # A mask token that the target lacks is still found.
    outside = inspect_checkpoint(write_muse(tmp_path / "outside", mask_token_id=97), target)
    assert not outside.fits


def test_an_assistant_that_names_its_vocabulary_and_causality_is_read_so(tmp_path):
    config = load_config(write_muse(tmp_path, vocab_size=97, is_causal=True))
    assert config.vocab_size == 97
    assert all(layer.causal for layer in config.layers)
    config = load_config(write_muse(tmp_path, architectures=None))
    assert config.vocab_size == 0


def test_an_assistant_converts_where_it_names_its_vocabulary(tmp_path):
    with pytest.raises(DFlashError, match="vocab_size is 0, which the z-lab dialect cannot"):
        convert(write_muse(tmp_path / "one"), tmp_path / "none", "z-lab")
    named = write_muse(tmp_path / "two", vocab_size=97)
    assert convert(named, tmp_path / "three", "z-lab") == load_config(named)


def test_rows_a_token_need_a_vocabulary(tmp_path):
    directory = write_muse(tmp_path, {"own_embedding": True})
    with pytest.raises(DFlashError, match="vocab_size is missing, but own_embedding"):
        load_config(directory)


def test_a_laguna_drafter_is_read_with_gate_norms_and_split_projections(tmp_path):
    ids = {"target_layer_ids": (1, 3)}
    found = load_checkpoint(write_laguna(tmp_path, ids))
    layers = ({**WINDOW, "causal": True},) * 2
    rope = {"max_position_embeddings": 512}
    wanted = tiny_config(**{**LAGUNA, **ids}, layers=layers, rope=rope)
    assert found.config == wanted
    tensors = tiny_tensors(wanted)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    assert found.config.reads_before_norm(4)


@pytest.mark.parametrize(
    ("gating", "gate"),
    [
        (True, "per-head"),
        (None, "per-head"),
        ("per-head", "per-head"),
        ("per-element", "per-element"),
        (False, None),
        ("disabled", None),
    ],
)
def test_gates(tmp_path, gating, gate):
    config = load_config(write_laguna(tmp_path, {"attention_gate": gate}, gating=gating))
    assert config.attention_gate == gate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gating": "per-token"}, "gating is 'per-token': write 'per-head'"),
        ({"gating": "per-element"}, "g_proj.weight' has shape"),
        ({"gating": "disabled"}, "g_proj.weight' does not belong .*DFLASH_PLUGIN=off"),
        ({"architectures": ["DFlashDraftModel"]}, "aux_hidden_norms.*DFLASH_PLUGIN=off"),
        ({"num_experts": 8}, "num_experts is 8"),
        (
            {"num_experts": 8, "mlp_layer_types": ["dense", "sparse"]},
            "mlp_layer_types is .*DFLASH_PLUGIN=off",
        ),
        ({"num_attention_heads_per_layer": [4, 8]}, r"per_layer is \[4, 8\].*heads 4"),
        ({"swa_attention_sink_enabled": True}, "swa_attention_sink_enabled is True"),
    ],
)
def test_what_laguna_layers_may_not_be_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(DFlashError, match=message):
        load_config(edited(write_laguna(tmp_path), **changes))


def test_experts_of_the_target_and_heads_that_agree_are_no_matter(tmp_path):
    plain = load_config(write_laguna(tmp_path / "one"))
    left = {"num_experts": 256, "mlp_layer_types": ["dense"] * 2}
    left["num_attention_heads_per_layer"] = [4, 4]
    assert load_config(edited(write_laguna(tmp_path / "two"), **left)) == plain


@pytest.mark.parametrize(
    "rotation",
    [
        {"rope_parameters": {"sliding_attention": {"rope_theta": 7.0}, "full_attention": {}}},
        {"rope_parameters": {"rope_theta": 5.0}, "swa_rope_parameters": {"rope_theta": 7.0}},
        {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": None},
    ],
)
def test_a_laguna_layer_type_has_its_own_rotation(tmp_path, rotation):
    config = load_config(write_laguna(tmp_path, **rotation))
    assert config.rope.theta == 7.0


def test_a_laguna_layer_types_own_rotation_counts_before_the_files(tmp_path):
    partial = {"sliding_attention": {"rope_theta": 7.0, "partial_rotary_factor": 1.0}}
    changes = {"rope_parameters": partial, "partial_rotary_factor": 0.5}
    assert load_config(write_laguna(tmp_path, **changes)).rope.partial_rotary_factor == 1.0


@pytest.mark.parametrize("dialect", ["z-lab", "speculators", "specforge", "modelopt"])
@pytest.mark.parametrize("part", LAGUNA)
def test_no_dialect_is_written_with_a_part_of_laguna(dialect, part):
    with pytest.raises(DFlashError, match=f"{part} is .*, which the {dialect} dialect cannot"):
        write_config(tiny_config(**{part: LAGUNA[part]}), dialect)


def with_ids(directory, ids, layers=4):
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw["dflash_config"]["target_layer_ids"], raw["num_target_layers"] = ids, layers
    path.write_text(json.dumps(raw))
    return directory


def test_ids_that_reach_the_number_of_layers_count_boundaries(tmp_path, caplog):
    directory = with_ids(write_tiny(tmp_path / "drafter"), [1, 4])
    with caplog.at_level(logging.WARNING, "dflash_plugin"):
        config = load_config(directory)
        load_config(directory)
    assert config.target_layer_ids == (0, 3)
    assert [("boundaries" in one.message) for one in caplog.records] == [True]
    findings = inspect_checkpoint(directory).findings
    said = {(one.level, one.subject): one.message for one in findings}
    assert "reach num_target_layers 4" in said["warning", "num_target_layers"]
    assert "layer 3 is the target's last" in said["warning", "target_layer_ids"]
    # Written, they count layer outputs.
    assert convert(directory, tmp_path / "again", "z-lab").target_layer_ids == (0, 3)


@pytest.mark.parametrize("ids", [[0, 4], [-1, 4]])
def test_boundaries_before_the_first_layer_are_refused(tmp_path, ids):
    with pytest.raises(DFlashError, match=rf"id 4 is out of range .* id {ids[0]} is no layer's"):
        load_config(with_ids(write_tiny(tmp_path), ids))


def test_a_file_without_the_number_of_layers_is_told_what_to_add(tmp_path):
    directory = with_ids(write_tiny(tmp_path), [1, 4], layers=None)
    with pytest.raises(DFlashError, match=r"reads target layer 4 .* add num_target_layers 4"):
        load_drafter(directory, tiny_target())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.integers(5, 60),
    drawn=st.lists(st.integers(0, 60), min_size=2, max_size=4, unique=True),
)
def test_the_rule_for_ids_holds_for_all(layers, drawn):
    """Every id means one layer; none is out of range, and only ids that reach the end move."""
    ids = sorted(drawn)
    raw = {
        **write_config(tiny_config(num_target_layers=None), "z-lab"),
        "num_target_layers": layers,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": ids},
    }
    if ids[-1] < layers:
        assert read_config(raw, {}).target_layer_ids == tuple(ids)
    elif ids[-1] == layers and ids[0] > 0:
        assert read_config(raw, {}).target_layer_ids == tuple(i - 1 for i in ids)
    else:
        with pytest.raises(DFlashError, match=rf"id {max(layers, min(ids))}|out of range"):
            read_config(raw, {})


@pytest.mark.parametrize("write", [write_muse, write_laguna])
def test_their_files_are_known_for_dflash_drafters(tmp_path, write):
    """An engine that is given no method asks."""
    raw = json.loads((write(tmp_path) / "config.json").read_text())
    assert is_dflash(raw)
    assert not is_dflash({**raw, "architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"rope_theta": None, "swa_rope_parameters": {"rope_theta": 7.0}}, None),
        ({"rope_theta": 7.0, "swa_rope_parameters": {"rope_theta": 7.0}}, None),
        ({"swa_rope_parameters": {"rope_theta": 7.0}}, "before the file's rope_theta 10000.0"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 7.0}}},
            "before the file's rope_theta 10000.0",
        ),
    ],
)
def test_a_rotation_of_the_layers_own_is_told(tmp_path, caplog, changes, rule):
    directory = write_laguna(tmp_path, **changes)
    load_config(directory)
    report = inspect_checkpoint(directory)
    told = [f.message for f in report.findings if f.subject == "rope_parameters"]
    if rule is None:
        assert not told
        assert "own rotation" not in caplog.text
    else:
        assert rule in told[0]
        assert rule in caplog.text


@pytest.mark.parametrize(
    ("full", "message"),
    [({"rope_theta": 7.0}, None), ({"rope_theta": 9.0}, "rope_theta is 7.0 and rope_theta is 9.0")],
)
def test_windows_with_a_rotation_of_their_own_beside_full_layers(tmp_path, full, message):
    changes = {
        "layer_types": ["sliding_attention", "full_attention"],
        "swa_rope_parameters": {"rope_theta": 7.0, "rope_type": "default"},
        "rope_theta": None,
        "rope_parameters": full,
    }
    directory = write_laguna(tmp_path, **changes)
    if message is None:
        assert load_config(directory).rope.theta == 7.0
        return
    with pytest.raises(DFlashError, match=message):
        load_config(directory)
