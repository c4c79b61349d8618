"""Dialects read into one configuration, and malformed checkpoints are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dflash_plugin.checkpoints.convert import convert
from dflash_plugin.checkpoints.dialects import DIALECTS, detect, read_config, write_config
from dflash_plugin.checkpoints.io import (
    expected_tensors,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from dflash_plugin.drafter.config import (
    ConvolutionConfig,
    DrafterConfig,
    LayerAttention,
    RopeConfig,
    SelectorConfig,
    spread_layers,
)
from dflash_plugin.errors import DFlashError
from tests.helpers.tiny import DFLASH2, tiny_config, tiny_tensors, write_tiny

SLIDING = ["sliding_attention"] * 2


def edit(directory: Path, **changes) -> None:
    """Change config.json; "section.name" reaches into a section, None removes."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = raw
        for section in sections:
            place = place[section]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(json.dumps(raw))


def retensor(directory: Path, change) -> None:
    """Rewrite model.safetensors through ``change(tensors)``."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def setter(name, value):
    return lambda directory: retensor(directory, lambda t: t.__setitem__(name, value(t)))


def dropper(name):
    return lambda directory: retensor(directory, lambda t: t.pop(name))


def editor(**changes):
    return lambda directory: edit(directory, **changes)


def writer(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def pickled_only(directory):
    (directory / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, directory / "pytorch_model.bin")


def truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


MALFORMED = {
    "config-missing": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "adapter": (
        lambda d: (d / "config.json").rename(d / "adapter_config.json"),
        "a LoRA adapter, and a drafter takes none, so merge it",
    ),
    "config-not-json": (writer("config.json", b"{"), "config.json is not readable JSON"),
    "config-not-text": (writer("config.json", b"\xff\xfe"), "config.json is not readable JSON"),
    "config-a-list": (writer("config.json", b"[]"), "holds a list"),
    "weights-missing": (lambda d: (d / "model.safetensors").unlink(), "no .safetensors file"),
    "weights-pickled": (pickled_only, "pytorch_model.bin is a pickle file"),
    "mask-pickled": (writer("mask_embedding.pt", b""), "mask_embedding.pt is a pickle file"),
    "weights-truncated": (truncated, r"is truncated: \d+ bytes where the header says \d+"),
    "weights-empty": (writer("model.safetensors", b""), "is truncated: 0 bytes where"),
    "index-broken": (writer("model.safetensors.index.json", b"{}"), "has no weight_map"),
    "shard-missing": (
        writer("model.safetensors.index.json", b'{"weight_map": {"fc.weight": "b.safetensors"}}'),
        "names b.safetensors, which is not there",
    ),
    "shard-twice": (
        lambda d: save_file({"fc.weight": torch.zeros(1)}, d / "z.safetensors"),
        "'fc.weight' stands twice",
    ),
    "quantised": (editor(quantization_config={"bits": 4}), "quantised.*DFLASH_PLUGIN=off"),
    "other-architecture": (editor(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    "dflash2-architecture-alone": (
        editor(architectures=["DFlash2DraftModel"]),
        "conv_kernel_size is missing",
    ),
    "dflash2-key-alone": (
        editor(dflash_config__selector_rank=256),
        r"selector_rank is 256, of a DFlash 2 drafter.*write \['DFlash2DraftModel'\]",
    ),
    "dflash2-tensor-alone": (
        setter("layers.0.mlp_conv.base_kernel", lambda t: torch.zeros(2, 2, 32)),
        "does not belong.*a DFlash 2 drafter, check architectures",
    ),
    "domino": (editor(dflash_config__projector_type="domino"), "projector_type is 'domino'"),
    "shifted": (editor(dflash_config__shift_label=True), "shift_label"),
    "section-a-list": (editor(dflash_config=[1]), r"dflash_config is \[1\]"),
    "hidden-missing": (editor(hidden_size=None), "hidden_size is missing"),
    "hidden-text": (editor(hidden_size="32"), "hidden_size is '32'"),
    "hidden-zero": (editor(hidden_size=0), "hidden_size is 0"),
    "hidden-wrong": (editor(hidden_size=64), r"'fc.weight' has shape \[32, 64\]"),
    "heads-bool": (editor(num_attention_heads=True), "num_attention_heads is True"),
    "heads-not-multiple": (editor(num_attention_heads=3), "not a multiple of num_key_value_heads"),
    "head-dim-odd": (editor(head_dim=7), "head_dim 7"),
    "layers-too-many": (
        editor(num_hidden_layers=3, layer_types=None),
        "'layers.2.*is missing: check num_hidden_layers",
    ),
    "layers-too-few": (
        editor(num_hidden_layers=1, layer_types=None),
        "'layers.1.*does not belong.*check num_hidden_layers",
    ),
    "layer-types-short": (editor(layer_types=["full_attention"]), "one type for each"),
    "layer-types-odd": (editor(layer_types=["full_attention", "linear"]), "'linear'"),
    "window-missing": (editor(layer_types=SLIDING, use_sliding_window=True), "sliding_window is m"),
    "window-off": (editor(layer_types=SLIDING), "use_sliding_window is False"),
    "window-zero": (
        editor(layer_types=SLIDING, use_sliding_window=True, sliding_window=0),
        "sliding_window is 0",
    ),
    "causal-text": (editor(is_causal="no"), "is_causal is 'no'"),
    "rope-theta-missing": (editor(rope_theta=None, rope_parameters=None), "rope_theta is missing"),
    "rope-theta-negative": (editor(rope_parameters={"rope_theta": -1.0}), "theta is -1.0"),
    "rope-type": (
        editor(rope_parameters={"rope_theta": 1e4, "rope_type": "spiral"}),
        "rope type is 'spiral'",
    ),
    "rope-factor": (
        editor(rope_parameters={"rope_theta": 1e4, "rope_type": "yarn"}),
        "rope factor is None",
    ),
    "rope-nested": (
        editor(
            rope_parameters={
                "sliding_attention": {"rope_theta": 1.0},
                "other": {"rope_theta": 2.0},
            }
        ),
        "rope_parameters differ",
    ),
    "block-one": (editor(block_size=1), "block_size is 1"),
    "block-missing": (editor(block_size=None), "block_size is missing"),
    "mask-missing": (editor(dflash_config__mask_token_id=None), "mask_token_id is missing"),
    "mask-negative": (editor(dflash_config__mask_token_id=-1), "mask_token_id is -1"),
    "mask-outside": (editor(dflash_config__mask_token_id=97), "mask_token_id is 97, outside"),
    "layer-ids-missing": (
        editor(dflash_config__target_layer_ids=None, num_target_layers=None),
        "target_layer_ids is missing",
    ),
    "layer-ids-text": (editor(dflash_config__target_layer_ids="0,2"), "target_layer_ids is '0,2'"),
    "layer-ids-empty": (editor(dflash_config__target_layer_ids=[]), r"target_layer_ids is \[\]"),
    "layer-id-below": (editor(dflash_config__target_layer_ids=[-2, 0]), "id -2 is below -1"),
    "layer-id-above": (editor(dflash_config__target_layer_ids=[0, 4]), "id 4 is out of range"),
    "layer-id-twice": (editor(dflash_config__target_layer_ids=[2, 2]), "id 2 is listed twice"),
    "layer-ids-three": (editor(dflash_config__target_layer_ids=[0, 1, 2]), "'fc.weight' has shape"),
    "activation": (editor(hidden_act="sillu"), "hidden_act is 'sillu'"),
    "dtype": (editor(dtype="float8_e4m3fn"), "dtype is 'float8_e4m3fn'"),
    "eps": (editor(rms_norm_eps=0), "rms_norm_eps is 0"),
    "softcap": (editor(dflash_config__final_logit_softcapping=-3.0), "logit_softcap is -3.0"),
    "draft-vocabulary-large": (editor(draft_vocab_size=98), "draft_vocab_size is 98"),
    "draft-vocabulary-no-head": (editor(draft_vocab_size=40), "needs its own head"),
    "head-announced": (editor(has_own_lm_head=True), "there is no lm_head.weight"),
    "tensor-missing": (dropper("norm.weight"), "'norm.weight' .* is missing"),
    "qk-norm-missing": (dropper("layers.0.self_attn.q_norm.weight"), "must say qk_norm: false"),
    "tensor-extra": (setter("layers.0.extra", lambda t: torch.zeros(2)), "'layers.0.extra' does n"),
    "bias-extra": (
        setter("layers.0.self_attn.q_proj.bias", lambda t: torch.zeros(32)),
        "check attention_bias",
    ),
    "tensor-shape": (
        setter("layers.1.mlp.up_proj.weight", lambda t: torch.zeros(3, 32)),
        r"shape \[3, 32\]",
    ),
    "tensor-nan": (
        setter("norm.weight", lambda t: t["norm.weight"] * float("nan")),
        "'norm.weight' has values that are not finite",
    ),
    "tensor-integers": (
        setter("fc.weight", lambda t: t["fc.weight"].to(torch.int8)),
        "'fc.weight' is int8",
    ),
    "fused-odd": (
        setter("layers.0.self_attn.qkv_proj.weight", lambda t: torch.zeros(33, 32)),
        "33 rows",
    ),
    "fused-twice": (
        setter("layers.0.mlp.gate_up_proj.weight", lambda t: torch.zeros(80, 32)),
        "both fused and alone",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_checkpoint_is_refused_by_name(case, tmp_path):
    spoil, message = MALFORMED[case]
    directory = write_tiny(tmp_path / "drafter")
    spoil(directory)
    with pytest.raises(DFlashError, match=message) as caught:
        load_checkpoint(directory)
    assert str(directory) in str(caught.value)
    assert ":" in str(caught.value)


SECTION = "dflash_config__"
MALFORMED_DFLASH2 = {
    "architecture": (
        editor(architectures=["DFlashDraftModel"]),
        "conv_kernel_size is 2, of a DFlash 2 drafter",
    ),
    "group-missing": (editor(**{SECTION + "conv_group_size": None}), "conv_group_size is missing"),
    "group-no-divisor": (editor(**{SECTION + "conv_group_size": 5}), "is 5, which does not divide"),
    "taps-zero": (editor(**{SECTION + "conv_kernel_size": 0}), "conv_kernel_size is 0"),
    "taps-too-many": (
        editor(**{SECTION + "conv_kernel_size": 5}),
        "conv_kernel_size is 5, more than block_size 4",
    ),
    "taps-differ": (
        editor(**{SECTION + "conv_kernel_size": 3}),
        r"attention_conv.base_kernel' has shape \[2, 2, 32\] but config.json makes it \[2, 3, 32\]",
    ),
    "rank-text": (editor(**{SECTION + "selector_rank": "6"}), "selector_rank is '6'"),
    "rank-differs": (editor(**{SECTION + "selector_rank": 7}), r"makes it \[97, 7\]"),
    "one-candidate": (editor(**{SECTION + "selector_top_k": 1}), "selector_top_k is 1.*at least 2"),
    "candidates-too-many": (
        editor(**{SECTION + "selector_top_k": 98}),
        "selector_top_k is 98, more than vocab_size 97",
    ),
    "anchor-drafts": (editor(sample_from_anchor=True), "sample_from_anchor is true"),
    "reduced": (
        lambda d: (
            editor(draft_vocab_size=24)(d),
            setter("lm_head.weight", lambda t: torch.zeros(24, 32))(d),
        ),
        "draft_vocab_size is 24, but the selector",
    ),
    "codebook-missing": (
        dropper("candidate_selector.successor_codebook"),
        "'candidate_selector.successor_codebook' .* is missing",
    ),
    "projector": (
        editor(dflash_config__projector_type="dspark"),
        "projector_type is 'dspark'.*architecture is 'DFlash2DraftModel'",
    ),
}


@pytest.mark.parametrize("case", MALFORMED_DFLASH2)
def test_a_malformed_dflash2_checkpoint_is_refused_by_name(case, tmp_path):
    spoil, message = MALFORMED_DFLASH2[case]
    directory = write_tiny(tmp_path / "drafter", **DFLASH2)
    spoil(directory)
    with pytest.raises(DFlashError, match=message):
        load_checkpoint(directory)


@pytest.mark.parametrize("alone", DFLASH2)
def test_convolution_and_selector_come_together(alone):
    with pytest.raises(ValueError, match="a DFlash 2 drafter has both"):
        tiny_config(**{alone: DFLASH2[alone]})


REDUCED = {"draft_vocab_size": 24, "own_head": True}
MALFORMED_REDUCED = {
    "map-missing": (dropper("d2t"), "'d2t' .* is missing"),
    "map-outside": (setter("d2t", lambda t: t["d2t"] + 90), "outside the vocabulary of 97"),
    "map-doubled": (
        setter("d2t", lambda t: -torch.arange(24)),
        "two draft tokens to one target token",
    ),
    "map-float": (setter("d2t", lambda t: t["d2t"].float()), "'d2t' is float32"),
    "marks-wrong": (setter("t2d", lambda t: ~t["t2d"]), "t2d does not mark"),
    "method": (editor(speculators_model_type="eagle3"), "speculators_model_type is 'eagle3'"),
    "layer-missing": (editor(transformer_layer_config=None), "transformer_layer_config is missing"),
    "layer-kind": (editor(transformer_layer_config__model_type="nope"), "model_type 'nope'"),
    "ids-missing": (editor(aux_hidden_state_layer_ids=None), "aux_hidden_state_layer_ids is m"),
    "mask": (editor(mask_token_id=None), "mask_token_id is missing"),
    "anchor": (editor(sample_from_anchor=1), "sample_from_anchor is 1"),
}


@pytest.mark.parametrize("case", MALFORMED_REDUCED)
def test_a_malformed_speculators_checkpoint_is_refused_by_name(case, tmp_path):
    spoil, message = MALFORMED_REDUCED[case]
    directory = write_tiny(tmp_path / "drafter", "speculators", **REDUCED)
    spoil(directory)
    with pytest.raises(DFlashError, match=message):
        load_checkpoint(directory)


def test_what_is_not_a_directory_is_refused(tmp_path):
    with pytest.raises(DFlashError, match="not a directory"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(DFlashError, match="dialect is 'klingon'"):
        load_checkpoint(write_tiny(tmp_path / "drafter"), dialect="klingon")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_in_any_field_is_understood_or_refused(data):
    """Nothing but DFlashError comes out of a config.json, whatever stands in it."""
    dialect = data.draw(st.sampled_from(DIALECTS))
    config = tiny_config()
    raw = write_config(config, dialect)
    place = raw
    inner = {"speculators": "transformer_layer_config"}.get(dialect, "dflash_config")
    if data.draw(st.booleans()):
        place = raw[inner]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    try:
        found = read_config(raw, expected_tensors(config), None)
    except DFlashError:
        return
    assert isinstance(found, DrafterConfig)


WINDOW = LayerAttention(sliding_window=7)
CAUSAL_WINDOW = LayerAttention(sliding_window=7, causal=True)
YARN = RopeConfig(
    theta=5e5,
    type="yarn",
    parameters={"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
    max_position_embeddings=256,
)
DRAFTERS = {
    "plain": {},
    "causal": {"layers": (LayerAttention(causal=True),) * 2},
    "sliding": {"layers": (WINDOW, WINDOW)},
    "mixed-by-type": {"layers": (LayerAttention(), CAUSAL_WINDOW)},
    "mixed-not-causal": {"layers": (LayerAttention(), WINDOW)},
    "from-anchor": {"layers": (LayerAttention(), CAUSAL_WINDOW), "window_from": "anchor"},
    "from-anchor-not-causal": {"layers": (WINDOW, WINDOW), "window_from": "anchor"},
    "yarn": {"rope": YARN},
    "interleaved": {"rope": RopeConfig(interleaved=True, partial_rotary_factor=0.5)},
    "biased": {"attention_bias": True, "attention_output_bias": True},
    "mlp-biased": {"mlp_bias": True},
    "no-qk-norm": {"qk_norm": False},
    "reduced": REDUCED,
    "own": {"own_embedding": True, "own_head": True},
    "own-mask": {"own_mask_embedding": True},
    "sinks": {"attention_sinks": True, "attention_value_scale": 0.7},
    "scaled": {"embedding_scale": 2.5, "logit_scale": 0.5, "logit_softcap": 30.0},
    "gemma": {"norm_style": "gemma"},
    "anchor-row": {"sample_from_anchor": True},
    "embedding-layer": {"target_layer_ids": (-1, 3)},
    "narrow-target": {"target_hidden_size": 24},
    "dflash2": DFLASH2,
}
INEXPRESSIBLE = {
    "z-lab": {"from-anchor", "from-anchor-not-causal"},
    "modelopt": {"from-anchor", "from-anchor-not-causal", "mixed-by-type", "dflash2"},
    "specforge": {"causal", "mixed-by-type", "from-anchor", "from-anchor-not-causal", "dflash2"},
    "speculators": {
        "causal",
        "sliding",
        "mixed-by-type",
        "mixed-not-causal",
        "mlp-biased",
        "no-qk-norm",
        "own-mask",
        "sinks",
        "scaled",
        "gemma",
        "dflash2",
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_reads_back_as_it_was_written(dialect, name, tmp_path):
    config = tiny_config(**DRAFTERS[name])
    tensors = tiny_tensors(config)
    if name in INEXPRESSIBLE[dialect]:
        with pytest.raises(DFlashError, match="cannot express"):
            save_checkpoint(tmp_path / "drafter", config, tensors, dialect)
        assert not (tmp_path / "drafter").exists()
        return
    save_checkpoint(tmp_path / "drafter", config, tensors, dialect)
    found = load_checkpoint(tmp_path / "drafter", dialect=dialect)
    ignored = {"dialect"}
    if dialect == "speculators":
        ignored.add("num_target_layers")
    if not any(layer.sliding_window for layer in config.layers):
        ignored.add("window_from")
    wanted = config.model_dump(exclude=ignored)
    if dialect == "speculators":
        wanted["embedding_scale"] = 1.0  # stored rows
    assert found.config.model_dump(exclude=ignored) == wanted
    assert found.config.dialect == dialect
    assert set(found.tensors) == set(tensors)
    assert all(torch.equal(found.tensors[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("source", DIALECTS)
def test_convert_keeps_the_drafter(source, dialect, tmp_path):
    first = write_tiny(tmp_path / "first", source)
    (first / "known_answer.json").write_text("{}")
    config = convert(first, tmp_path / "second", dialect)
    assert config.dialect == dialect
    assert (tmp_path / "second" / "known_answer.json").read_text() == "{}"
    before, after = load_checkpoint(first).tensors, load_checkpoint(tmp_path / "second").tensors
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_keeps_a_dflash2_drafter(tmp_path):
    """Its codebooks also under the names that the module of PyPI dflash has for them."""
    first = write_tiny(tmp_path / "first", **DFLASH2)
    before = load_checkpoint(first)

    def rename(tensors):
        for name in [name for name in tensors if name.endswith("_codebook")]:
            tensors[f"{name}.weight"] = tensors.pop(name)

    retensor(first, rename)
    assert convert(first, tmp_path / "second", "z-lab") == before.config
    after = load_file(tmp_path / "second" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.tensors.items())


def test_a_file_in_the_way_of_a_directory_is_named(tmp_path):
    first = write_tiny(tmp_path / "first")
    (tmp_path / "second").write_text("kept")
    with pytest.raises(DFlashError, match="second cannot be made"):
        convert(first, tmp_path / "second", "z-lab")
    assert (tmp_path / "second").read_text() == "kept"


def test_convert_loses_nothing(tmp_path):
    first = write_tiny(tmp_path / "first")
    write_tiny(tmp_path / "second", seed=5)
    kept = (tmp_path / "second" / "model.safetensors").read_bytes()
    with pytest.raises(DFlashError, match="already there"):
        convert(first, tmp_path / "second", "speculators")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == kept
    with pytest.raises(DFlashError, match="is the source itself"):
        convert(first, first, "speculators", overwrite=True)
    convert(first, tmp_path / "second", "speculators", overwrite=True)
    assert detect(json.loads((tmp_path / "second" / "config.json").read_text())) == "speculators"


def test_public_dialects_as_their_exporters_write_them():
    """Configurations as the public exporters leave them, key for key."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 5,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 1000000,
        "rope_scaling": None,
        "max_position_embeddings": 40960,
    }
    zlab = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        **sizes,
        "block_size": 16,
        "num_target_layers": 36,
        "layer_types": ["full_attention"] * 5,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    }
    config = read_config(zlab, {})
    assert (config.dialect, config.num_draft_tokens) == ("z-lab", 15)
    assert config.layers == (LayerAttention(),) * 5
    assert spread_layers(36, 5) == config.target_layer_ids
    specforge = {
        **{k: v for k, v in zlab.items() if k != "dflash_config"},
        "auto_map": {"AutoModel": "modeling_dflash.DFlashDraftModel"},
        "layer_types": ["sliding_attention"] * 5,
        "sliding_window": 2048,
        "use_sliding_window": True,
        "mask_token_id": 151669,
    }
    config = read_config(specforge, {})
    assert config.dialect == "specforge"
    assert config.layers == (LayerAttention(sliding_window=2048),) * 5
    dflash2 = {
        **{k: v for k, v in zlab.items() if k != "block_size"},
        "architectures": ["DFlash2DraftModel"],
        "layer_types": ["sliding_attention"] * 5,
        "sliding_window": 2048,
        "use_sliding_window": True,
        "is_causal": False,
        "dflash_config": {
            **zlab["dflash_config"],
            "block_size": 8,
            "conv_kernel_size": 2,
            "conv_group_size": 16,
            "selector_rank": 256,
            "selector_top_k": 16,
        },
    }
    config = read_config(dflash2, {})
    assert (config.dialect, config.num_draft_tokens) == ("z-lab", 7)
    assert config.layers == (LayerAttention(sliding_window=2048),) * 5
    assert config.convolution == ConvolutionConfig(kernel_size=2, group_size=16)
    assert config.selector == SelectorConfig(rank=256, top_k=16)
    assert config.target_layer_ids == (1, 9, 17, 25, 33)
    assert read_config(specforge, {}, "z-lab").layers[0].causal
    modelopt = {
        **zlab,
        "auto_map": None,
        "sliding_window": 512,
        "dflash_config": {
            **zlab["dflash_config"],
            "use_swa": True,
            "swa_window_size": 512,
            "causal": False,
            "attention_sink_bias": True,
        },
    }
    config = read_config(modelopt, {})
    assert config.dialect == "modelopt"
    assert config.layers == (LayerAttention(sliding_window=512),) * 5
    assert config.attention_sinks
    speculators = {
        "speculators_model_type": "dflash",
        "architectures": ["DFlashSpeculator"],
        # What equals Qwen3Config's defaults is left out by the writer.
        "transformer_layer_config": {
            "model_type": "qwen3",
            "num_hidden_layers": 3,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        "aux_hidden_state_layer_ids": [2, 18, 33],
        "mask_token_id": 151669,
        "block_size": 8,
        "draft_vocab_size": 32000,
    }
    config = read_config(speculators, {"lm_head.weight": (32000, 4096)})
    assert config.target_layer_ids == (1, 17, 32)
    assert (config.hidden_size, config.vocab_size) == (4096, 151936)
    assert (config.draft_vocab_size, config.num_draft_tokens) == (32000, 7)


def test_other_names_for_the_same_tensors(tmp_path):
    directory = write_tiny(tmp_path / "drafter")
    plain = load_checkpoint(directory).tensors

    def rename(tensors):
        for index in range(2):
            layer = f"layers.{index}"
            qkv = [tensors.pop(f"{layer}.self_attn.{p}_proj.weight") for p in "qkv"]
            tensors[f"{layer}.self_attn.qkv_proj.weight"] = torch.cat(qkv)
            gate_up = [tensors.pop(f"{layer}.mlp.{p}_proj.weight") for p in ("gate", "up")]
            tensors[f"{layer}.mlp.gate_up_proj.weight"] = torch.cat(gate_up)
        tensors["encoder.fc.weight"] = tensors.pop("fc.weight")
        for name in list(tensors):
            tensors[f"model.{name}" if "encoder" not in name else name] = tensors.pop(name)
        tensors["rotary_emb.inv_freq"] = torch.zeros(4)

    retensor(directory, rename)
    found = load_checkpoint(directory).tensors
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_shards_and_dtypes(tmp_path):
    directory = write_tiny(tmp_path / "drafter")
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    for part, group in (("a", names[::2]), ("b", names[1::2])):
        save_file({n: tensors[n].clone() for n in group}, directory / f"{part}.safetensors")
    (directory / "model.safetensors").unlink()
    edit(directory, dtype="bfloat16", torch_dtype=None)
    assert load_checkpoint(directory).config.dtype == "float32"
    found = load_checkpoint(directory, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    assert set(found.tensors) == set(names)


@pytest.mark.parametrize(
    ("name", "changes"), [("Qwen3DFlashDraftModel", {}), ("Qwen3DFlash2DraftModel", DFLASH2)]
)
def test_automodels_names_of_the_architectures(name, changes, tmp_path):
    directory = write_tiny(tmp_path, **changes)
    wanted, path = load_config(directory), directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [name]}))
    assert load_config(directory) == wanted


def test_strays_beside_the_weights_are_ignored(tmp_path):
    directory = write_tiny(tmp_path / "drafter")
    wanted = load_checkpoint(directory)
    other = {name: tensor + 1 for name, tensor in wanted.tensors.items()}
    for stray in ("consolidated.safetensors", "optimizer-00001.safetensors"):
        save_file(other, directory / stray)
    for stray in ("optimizer.pt", "training_args.bin", "scheduler.pt"):
        (directory / stray).write_bytes(b"no pickle")
    for listed in (False, True):
        if listed:  # Files that the index does not list are strays, whatever their names.
            save_file(other, directory / "model-old.safetensors")
            weight_map = dict.fromkeys(wanted.tensors, "model.safetensors")
            index = directory / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": weight_map}))
        found = load_checkpoint(directory)
        assert found.tensors.keys() == wanted.tensors.keys()
        assert all(torch.equal(found.tensors[n], wanted.tensors[n]) for n in wanted.tensors)


@pytest.mark.parametrize("which", ["mask", "mask beside its id", "weights", "both"])
def test_convert_reads_pickled_tensors(which, tmp_path):
    directory = write_tiny(tmp_path / "drafter", own_mask_embedding=True)
    wanted, path = load_checkpoint(directory), directory / "model.safetensors"
    tensors = load_file(path)
    mask = tensors.pop("mask_embedding")
    path.unlink()
    if which.startswith("mask"):
        save_file(tensors, path)
    else:
        torch.save(tensors | ({} if which == "both" else {"mask_embedding": mask}),
                   directory / "pytorch_model.bin")  # fmt: skip
    if which == "mask beside its id":
        torch.save({"mask_token_id": 96, "embedding": mask}, directory / "mask_embedding.pt")
    elif which != "weights":
        torch.save(mask[None], directory / "mask_embedding.pt")
    with pytest.raises(DFlashError, match=r"`dflash-plugin convert` writes.*DFLASH_PLUGIN=off"):
        load_checkpoint(directory)
    convert(directory, tmp_path / "converted", "z-lab")
    found = load_checkpoint(tmp_path / "converted")
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[n], wanted.tensors[n]) for n in wanted.tensors)


class Evil:
    """Runs code where it is unpickled without care."""

    def __reduce__(self):
        return open, ("/tmp/dflash-plugin-was-here", "w")


def test_convert_runs_no_code_of_a_pickle(tmp_path):
    directory = write_tiny(tmp_path / "drafter")
    torch.save(Evil(), directory / "mask_embedding.pt")
    Path("/tmp/dflash-plugin-was-here").unlink(missing_ok=True)
    with pytest.raises(DFlashError, match=r"mask_embedding\.pt cannot be read as tensors alone"):
        convert(directory, tmp_path / "converted", "z-lab")
    assert not Path("/tmp/dflash-plugin-was-here").exists()
