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
from tests.checkpoints.test_open_spec import rewritten
from tests.helpers.layouts import write_laguna, write_muse
from tests.helpers.tiny import DFLASH2, write_tiny

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


# Names of one setting, with two values that it may have.
NAMES = {
    ("is_causal", "causal"): [False, True],
    ("is_causal", "dflash_query_causal"): [False, True],
    ("qk_norm", "use_qk_norm"): [True, False],
    ("logit_scale", "output_multiplier"): [1.0, 2.0],
    ("hidden_act", "hidden_activation"): ["silu", "gelu"],
    ("is_neox_style", "rope_is_neox_style"): [True, False],
}
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


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
        ({}, {"attention_mode": "mla"}, "kv_lora_rank is missing"),
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


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("nested", [False, True])
def test_two_names_of_one_setting_agree_or_are_refused(tmp_path, names, nested):
    directory = write_tiny(tmp_path)
    wanted = load_config(directory)
    first, other = names
    same, different = NAMES[names]
    raw = json.loads((directory / "config.json").read_text())
    for value in (same, different):
        place = {"dflash_config": {**raw["dflash_config"], other: value}} if nested else {
            other: value
        }  # fmt: skip
        changes = {**raw, first: same, **place}
        if value == same:
            found = read(directory, **changes)
            assert found.model_copy(update={"dialect": wanted.dialect}) == wanted
            continue
        with pytest.raises(DFlashError, match=rf"{first} is .*{other} is|{other} is .*{first} is"):
            read(directory, **changes)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([8, 8], None),
        ([8, 16], r"sliding_window is 8 and .*sliding_windows is \[8, 16\]"),
        ([8], r"sliding_windows is \[8\]: list one window"),
        (8, "sliding_windows is 8: list one window"),
        ([8, None], r"sliding_windows is \[8, None\]: give an integer"),
    ],
)
@pytest.mark.parametrize("dialect", ["z-lab", "speculators"])
def test_windows_by_layer(tmp_path, dialect, windows, message):
    sliding = ({"sliding_window": 8, "causal": True},) * 2
    source = "anchor" if dialect == "speculators" else "query"
    directory = write_tiny(tmp_path, dialect, layers=sliding, window_from=source)
    wanted = load_config(directory)
    if message is None:
        assert read(directory, sliding_windows=windows) == wanted
        return
    with pytest.raises(DFlashError, match=message):
        read(directory, sliding_windows=windows)


def test_windows_by_layer_without_one_for_all(tmp_path):
    directory = write_tiny(tmp_path, layers=({"sliding_window": 8},) * 2)
    config = read(directory, sliding_window=None, sliding_windows=[8, 4])
    assert [layer.sliding_window for layer in config.layers] == [8, 4]


@pytest.mark.parametrize(("first", "windows"), [(0, [8, 8]), (1, [None, 8]), (None, [None, None])])
def test_layer_types_that_are_left_out_are_qwen3s(tmp_path, first, windows):
    changes = {"layer_types": None, "use_sliding_window": True, "sliding_window": 8}
    config = read(write_tiny(tmp_path), max_window_layers=first, is_causal=False, **changes)
    assert [layer.sliding_window for layer in config.layers] == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta is inf: give a finite"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "give a finite number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf: give a finite number"),
        ({"num_hidden_layers": 10**12, "layer_types": None}, "at most 1000 layers"),
        ({"head_dim": 10**12}, "head_dim is 1000000000000: a head has at most 65536 values"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "factor is 4.0 but the rope ty"),
        (
            {"rope_parameters": {"rope_theta": 1e4, **YARN, "beta_fast": "x"}},
            "do not fit rope type",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}},
            "do not fi",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, FULL: {"rope_theta": 1e6}}},
            r"full_attention\.rope_theta is 1000000\.0 and rope_parameters\.rope_theta is 10000",
        ),
        (
            {"rope_parameters": {**YARN, "type": "linear"}},
            "rope_type is 'yarn' and .*type is 'linear",
        ),
    ],
)
def test_numbers_and_rotations_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(DFlashError, match=message):
        read(write_tiny(tmp_path), **changes)


def test_rotation_that_stands_in_the_drafts_section(tmp_path):
    directory = write_tiny(tmp_path)
    draft = json.loads((directory / "config.json").read_text())["dflash_config"]
    with pytest.raises(
        DFlashError, match=r"dflash_config\.rope_theta is 5.0 and rope_theta is 1000"
    ):
        read(directory, dflash_config={**draft, "rope_theta": 5.0})
    nothing = {"rope_theta": None, "rope_parameters": None, "rope_scaling": None}
    assert read(directory, dflash_config={**draft, "rope_theta": 5e5}, **nothing).rope.theta == 5e5


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "hidden_act", "vocab_size"])
def test_speculators_layers_are_read_outside_of_their_section_too(tmp_path, name):
    directory = write_tiny(tmp_path, "speculators")
    wanted, path = load_config(directory), directory / "config.json"
    raw = json.loads(path.read_text())
    layer = raw["transformer_layer_config"]
    other = {"hidden_act": "gelu", "vocab_size": 104}.get(name, 0.5)
    with pytest.raises(DFlashError, match=rf"{name} is .* and transformer_layer_config\.{name} is"):
        read(directory, **{name: other})
    moved = {key: value for key, value in layer.items() if key != name}
    if name == "rope_theta":
        moved = {
            key: v for key, v in moved.items() if key not in ("rope_parameters", "rope_scaling")
        }
    assert read(directory, **{name: layer[name], "transformer_layer_config": moved}) == wanted


def test_a_key_that_stands_twice_in_one_object(tmp_path):
    path = write_tiny(tmp_path) / "config.json"
    text = path.read_text().replace('"block_size": 4', '"block_size": 4, "block_size": 4')
    path.write_text(text)
    assert load_config(tmp_path).block_size == 4
    path.write_text(text.replace('"block_size": 4,', '"block_size": 16,', 1))
    with pytest.raises(DFlashError, match=r"config\.json: block_size stands twice, as 16 and 4"):
        load_config(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_value_of_any_key_ends_in_another_error(fuzzed, data):
    """A file loads or is refused; what another library raises is no answer."""
    directory, raw = data.draw(st.sampled_from(fuzzed))
    sections = ["", *(name for name, value in raw.items() if isinstance(value, dict))]
    place = data.draw(st.sampled_from(sections))
    old = raw[place] if place else raw
    name = data.draw(
        st.sampled_from(sorted({*old, *TWICE, "moe", "layer_types", "attention_modes"}))
    )
    new = {**old, name: data.draw(JUNK)}
    (directory / "config.json").write_text(json.dumps({**raw, place: new} if place else new))
    try:
        found = load_config(directory).num_draft_tokens > 0
    except DFlashError as error:
        found = str(directory) in str(error)
    assert found


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzzed")
    made = [
        write_tiny(place / "z-lab"),
        write_tiny(place / "speculators", "speculators"),
        rewritten(write_tiny(place / "open", "speculators")),
        write_muse(place / "muse"),
        write_laguna(place / "laguna"),
        write_tiny(place / "second", **DFLASH2),
    ]
    return [(one, json.loads((one / "config.json").read_text())) for one in made]


@pytest.mark.parametrize("name", ["rope_local_base_freq", "swa_rope_theta"])
def test_a_base_of_windows_alone_counts_where_there_are_windows(tmp_path, name):
    directory = write_tiny(tmp_path)
    wanted = load_config(directory)
    assert read(directory, **{name: 1e6}) == wanted
    windows = {"layer_types": [SLIDING, FULL], "sliding_window": 8, "use_sliding_window": True}
    with pytest.raises(DFlashError, match=rf"{name} is 1000000.0 and rope_theta is 10000.0"):
        read(directory, **windows)
    assert read(directory, **{name: 1e4}, **windows).rope == wanted.rope
