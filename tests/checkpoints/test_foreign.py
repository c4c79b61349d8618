"""Settings of other models' layers are refused by name, unless they say what is computed anyway."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.errors import DFlashError
from tests.checkpoints.test_open_spec import rewritten
from tests.helpers.layouts import write_laguna
from tests.helpers.tiny import write_tiny

SECTIONS = {
    "z-lab": ("", lambda at: write_tiny(at)),
    "z-lab, nested": ("dflash_config", lambda at: write_tiny(at)),
    "speculators": ("", lambda at: write_tiny(at, "speculators")),
    "speculators' layers": ("transformer_layer_config", lambda at: write_tiny(at, "speculators")),
    "Open Spec Config": ("", lambda at: rewritten(write_tiny(at, "speculators"))),
    "its speculative part": (
        "speculative_config", lambda at: rewritten(write_tiny(at, "speculators")),
    ),
}  # fmt: skip
CHANGES_THE_ARITHMETIC = {
    "attn_logit_softcapping": 50.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "query_pre_attn_scalar": 256,
    "attention_multiplier": 0.0625,
    "rotary_dim": 4,
    "rotary_pct": 0.25,
    "norm_eps": 1e-3,
    "no_rope_layers": [1, 0],
    "position_embedding_type": "alibi",
    "micro_block_size": 3,
    "fc_layernorm": True,
    "moe": {"num_experts": 4},
    "use_moe": True,
    "n_routed_experts": 8,
    "use_mla": True,
    "projector_type": "domino",
    "shift_label": True,
    "eagle_aux_hidden_state_layer_ids": [2, 4],
}
# What the tiny drafter computes: heads 8 wide, all of them rotated, layers 0 and 2.
SAYS_THE_SAME = {
    "attn_logit_softcapping": 0,
    "residual_multiplier": 1.0,
    "query_pre_attn_scalar": 8,
    "attention_multiplier": 8**-0.5,
    "rotary_dim": 8,
    "rotary_pct": 1.0,
    "norm_eps": 1e-6,
    "no_rope_layers": [1, 1],
    "position_embedding_type": "rope",
    "anchor_len": 1,
    "moe": False,
    "num_experts": 0,
    "projector_type": "dflash",
    "shift_label": False,
    "eagle_aux_hidden_state_layer_ids": [1, 3],
}


def changed(directory: Path, place: str, **changes: Any) -> Path:
    """The checkpoint with changes to its config.json, or to a section of it."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    (raw[place] if place else raw).update(changes)
    path.write_text(json.dumps(raw))
    return directory


@pytest.mark.parametrize("layout", SECTIONS)
@pytest.mark.parametrize("name", CHANGES_THE_ARITHMETIC)
def test_what_nothing_reads_is_refused_with_its_place_and_value(tmp_path, layout, name):
    place, write = SECTIONS[layout]
    directory = changed(write(tmp_path), place, **{name: CHANGES_THE_ARITHMETIC[name]})
    said = CHANGES_THE_ARITHMETIC[name]
    value = str(said).lower() if name == "shift_label" else repr(said)
    with pytest.raises(DFlashError, match=re.escape(f"{name} is {value}")):
        load_config(directory)


@pytest.mark.parametrize("layout", SECTIONS)
def test_what_says_the_same_is_read_over(tmp_path, layout):
    place, write = SECTIONS[layout]
    wanted = load_config(write(tmp_path / "plain"))
    found = load_config(changed(write(tmp_path / "more"), place, **SAYS_THE_SAME))
    assert found.model_copy(update={"dialect": wanted.dialect}) == wanted


@pytest.mark.parametrize(
    "dense",
    [{"first_k_dense_replace": 2}, {"mlp_only_layers": [0, 1]}, {"mlp_layer_types": ["dense"] * 2}],
)
def test_experts_that_no_layer_has_are_left_over(tmp_path, dense):
    directory = write_tiny(tmp_path)
    wanted = load_config(directory)
    assert load_config(changed(directory, "", num_experts=8, **dense)) == wanted


@pytest.mark.parametrize(
    "sparse",
    [
        {"first_k_dense_replace": 1},
        {"mlp_only_layers": [1]},
        {"mlp_layer_types": ["dense", "sparse"]},
        {"mlp_layer_types": ["dense"]},
        {"first_k_dense_replace": "2"},
    ],
)
def test_experts_of_some_layers_are_refused(tmp_path, sparse):
    directory = changed(write_tiny(tmp_path), "", num_experts=8, **sparse)
    with pytest.raises(DFlashError, match=r"num_experts is 8|mlp_layer_types is .*DFLASH_PLUGIN"):
        load_config(directory)


def test_a_model_type_with_experts_by_default_does_not_make_dense_layers_sparse(tmp_path):
    directory = write_tiny(tmp_path, "speculators")
    wanted = load_config(directory)
    for kind in ("qwen3_moe", "gemma3_text", "deepseek_v3"):
        found = load_config(changed(directory, "transformer_layer_config", model_type=kind))
        assert found == wanted, kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attention_sink_bias": True}, "attention_sink_bias is True"),
        ({"use_gemma_norm": True}, "use_gemma_norm is True"),
        ({"is_causal": True}, "is_causal is True, but speculators' layouts"),
        ({"dflash_query_causal": True}, "dflash_query_causal is True, but speculators' layouts"),
    ],
)
def test_what_speculators_layouts_do_not_have_is_refused(tmp_path, changes, message):
    for place in (tmp_path / "own", tmp_path / "open"):
        directory = write_tiny(place, "speculators")
        directory = rewritten(directory) if place.name == "open" else directory
        with pytest.raises(DFlashError, match=message):
            load_config(changed(directory, "", **changes))


def test_windows_that_are_switched_off_in_a_speculators_file(tmp_path):
    sliding = {"layers": ({"sliding_window": 8, "causal": True},) * 2, "window_from": "anchor"}
    directory = write_tiny(tmp_path, "speculators", **sliding)
    changed(directory, "transformer_layer_config", use_sliding_window=False)
    with pytest.raises(DFlashError, match=r"layer_config\.use_sliding_window is False but layer_t"):
        load_config(directory)


@pytest.mark.parametrize("heads", [4, "4", [4], [4, 8], [4, 4, 4]])
def test_heads_by_layer_are_one_number_for_each(tmp_path, heads):
    directory = write_laguna(tmp_path, num_attention_heads_per_layer=heads)
    with pytest.raises(DFlashError, match="num_attention_heads_per_layer is"):
        load_config(directory)
