"""The configurations of public drafters load as what they are, or are refused by name.

A file of tests/data/configs holds keys and values that were found in public. Keys with an
underscore are notes on them, see ``NOTES``.
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from dflash_plugin.checkpoints.dialects import is_ambiguous
from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.drafter.config import DrafterConfig, LayerAttention
from dflash_plugin.errors import DFlashError

CONFIGS = sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))
NOTES = {
    "_source": "the public address or repository path, and when",
    "_complete": "whether every key that reading takes was found",
    "_expected": "loads_as, with fields of the DrafterConfig; refused, with a part of the message",
    "_known_gap": "what is missing where the expectation is not met yet",
    "_tensors": "the checkpoint's tensors beyond those of every drafter",
    "_shapes": "shapes that were found and do not follow from the configuration",
    "_pickled": "tensors in pickle files, each named after its tensor",
    "_layout": "whose tensor names, where they are not z-lab's",
}
# What stands in for keys that were not found: sizes of no model, a vocabulary for any mask token.
LAYER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300_000,
}
DRAFT = {"target_layer_ids": [1], "mask_token_id": 1}
BYTES = 2
# dtypes and bytes of the tensors that map vocabularies.
OF_MAPS = {"d2t": ("I64", 8), "t2d": ("BOOL", 1)}


def split(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Notes and configuration."""
    content = json.loads(path.read_text())
    notes = {key: value for key, value in content.items() if key.startswith("_")}
    return notes, {key: value for key, value in content.items() if key not in notes}


def completed(raw: dict[str, Any]) -> dict[str, Any]:
    """The configuration with ``LAYER`` and ``DRAFT`` for what was not found, all else as found."""
    if "speculators_model_type" in raw:
        layer = {**LAYER, **raw.get("transformer_layer_config", {})}
        outer = {
            "aux_hidden_state_layer_ids": DRAFT["target_layer_ids"],
            "mask_token_id": DRAFT["mask_token_id"],
            "draft_vocab_size": layer["vocab_size"],
        }
        return {**outer, **raw, "transformer_layer_config": layer}
    if "speculative_config" in raw:
        return {**LAYER, **raw}
    rope = {} if "rope_parameters" in raw else {"rope_theta": 10_000.0}
    draft = {name: value for name, value in DRAFT.items() if name not in raw}
    return {
        **LAYER,
        **rope,
        "block_size": raw.get("dflash_config", {}).get("block_size", 8),
        **raw,
        "dflash_config": {**draft, **raw.get("dflash_config", {})},
    }


def tensor_shapes(raw: dict[str, Any], notes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the checkpoint's writer has them, from the configuration alone."""
    layer = raw.get("transformer_layer_config", raw)
    draft = {**raw, **raw.get("dflash_config", {}), **raw.get("speculative_config", {})}
    taps = draft.get("target_layer_ids") or draft["aux_hidden_state_layer_ids"]
    hidden, vocabulary = layer["hidden_size"], layer.get("vocab_size")
    drafted = draft.get("draft_vocab_size") or vocabulary
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(taps) * (raw.get("target_hidden_size") or hidden)),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for index in range(layer["num_hidden_layers"]):
        parts = {**attention_shapes(layer, draft, notes), **mlp_shapes(layer, draft)}
        shapes |= {f"layers.{index}.{name}": shape for name, shape in parts.items()}
    if "selector_rank" in draft:
        rank = draft["selector_rank"]
        shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
        shapes["candidate_selector.predecessor_codebook"] = (vocabulary, rank)
        shapes["candidate_selector.successor_codebook"] = (vocabulary, rank)
    rows = {"embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (drafted, hidden)}
    optional = {**rows, "d2t": (drafted,), "t2d": (vocabulary,)}
    shapes |= {name: optional[name] for name in notes.get("_tensors", [])}
    if notes.get("_layout") == "muse":
        shapes["encoder.fc.weight"] = shapes.pop("fc.weight")
        shapes["encoder.output_norm_enc.weight"] = shapes.pop("hidden_norm.weight")
    if notes.get("_layout") == "laguna":
        shapes |= {f"aux_hidden_norms.{i}.weight": (hidden,) for i in range(len(taps))}
    return {**shapes, **{name: tuple(shape) for name, shape in notes.get("_shapes", {}).items()}}


def attention_shapes(
    layer: dict[str, Any], draft: dict[str, Any], notes: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Of one layer, its norm included."""
    hidden, heads = layer["hidden_size"], layer["num_attention_heads"]
    dim = layer.get("head_dim", hidden // heads)
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    if draft.get("attention_mode") == "mla":
        query, latent = layer["q_lora_rank"], layer["kv_lora_rank"]
        nope, rope = layer["qk_nope_head_dim"], layer["qk_rope_head_dim"]
        value = layer["v_head_dim"]
        linears = {
            "q_a_proj": (query, hidden),
            "q_b_proj": (heads * (nope + rope), query),
            "kv_a_proj_with_mqa": (latent + rope, hidden),
            "kv_b_proj": (heads * (nope + value), latent),
            "o_proj": (hidden, heads * value),
        }
        norms = {"q_a_layernorm": query, "kv_a_layernorm": latent}
    else:
        kv = layer["num_key_value_heads"] * dim
        apart = {"q_proj": (heads * dim, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        fused = {"qkv_proj": (heads * dim + 2 * kv, hidden), "g_proj": (heads, hidden)}
        linears = fused if notes.get("_layout") == "laguna" else apart
        linears = {**linears, "o_proj": (hidden, heads * dim)}
        norms = {"q_norm": dim, "k_norm": dim}
    for name, shape in linears.items():
        shapes[f"self_attn.{name}.weight"] = shape
        if layer.get("attention_bias"):
            shapes[f"self_attn.{name}.bias"] = shape[:1]
    shapes |= {f"self_attn.{name}.weight": (size,) for name, size in norms.items()}
    if draft.get("attention_sink_bias"):
        shapes["self_attn.attention_sink_bias"] = (heads,)
    return shapes


def mlp_shapes(layer: dict[str, Any], draft: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of one layer: its feed-forward network, the norm before it, and the convolutions."""
    hidden, inner = layer["hidden_size"], layer["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if "conv_kernel_size" in draft:
        taps, groups = draft["conv_kernel_size"], hidden // draft["conv_group_size"]
        for name in ("attention_conv", "mlp_conv"):
            shapes[f"{name}.base_kernel"] = (2, taps, hidden)
            shapes[f"{name}.kernel_projection.weight"] = (2 * taps * groups, hidden)
    return shapes


def write(directory: Path, raw: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint with the tensors' headers and a hole in the file for their values.

    A map of the draft vocabulary is whole: it takes the first of the target's tokens.
    """
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        dtype, size = OF_MAPS.get(name, ("BF16", BYTES))
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        if "t2d" in header:
            file.seek(8 + len(text) + header["t2d"]["data_offsets"][0])
            file.write(b"\1" * shapes["d2t"][0])
    return directory


def described(layer: LayerAttention) -> str:
    """A layer as the files write it: "all", "2048", "2048 causal"."""
    reach = str(layer.sliding_window or "all")
    return f"{reach} causal" if layer.causal else reach


def check_fields(config: DrafterConfig, expected: dict[str, Any]) -> None:
    """Compare the fields that a file names; of a nested field, the values that it names."""
    read = config.model_dump(mode="json")
    read["layers"] = [described(layer) for layer in config.layers]
    for name, value in expected.items():
        if isinstance(value, dict):
            read[name] = {key: read[name][key] for key in value}
        assert read[name] == value, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_or_is_refused_as_expected(path, tmp_path, request):
    notes, raw = split(path)
    if "_known_gap" in notes:
        missing = (DFlashError, AssertionError)
        reason = notes["_known_gap"]
        request.applymarker(pytest.mark.xfail(strict=True, raises=missing, reason=reason))
    raw = raw if notes["_complete"] else completed(raw)
    shapes, expected = tensor_shapes(raw, notes), notes["_expected"]
    pickled = notes.get("_pickled", [])
    if "refused" in expected:
        directory = write(tmp_path / "published", raw, shapes)
        for name in pickled:
            (directory / f"{name}.pt").touch()
        with pytest.raises(DFlashError, match=re.escape(expected["refused"])):
            load_config(directory)
    if "loads_as" in expected:
        # What `convert` makes of pickled tensors.
        shapes |= dict.fromkeys(pickled, shapes["norm.weight"])
        config = load_config(write(tmp_path / "tensors", raw, shapes))
        check_fields(config, expected["loads_as"])
        assert is_ambiguous(raw) == expected.get("ambiguous", False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_says_where_it_is_from_and_what_is_expected(path):
    notes, raw = split(path)
    assert raw
    assert notes.keys() <= NOTES.keys()
    assert re.search(r"https://|repository|public", notes["_source"])
    assert isinstance(notes["_complete"], bool)
    expected = notes["_expected"]
    assert expected.keys() <= {"loads_as", "refused", "ambiguous"}
    assert expected.get("loads_as") or expected.get("refused")
    # A refusal without a way on is for what no reading could serve.
    assert ("loads_as" in expected) == ("refused" not in expected) or "_pickled" in notes


def test_there_are_configurations_of_every_layout():
    """A glob that finds nothing would leave the tests above without a case."""
    marks = ("speculators_model_type", "open_spec_config_version", "dflash_config")
    for mark in marks:
        assert any(mark in split(path)[1] for path in CONFIGS), mark
