"""Drafters with latent attention (MLA): what a file says of them, and what contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.checkpoints.convert import convert
from dflash_plugin.checkpoints.dialects import read_config
from dflash_plugin.checkpoints.io import expected_tensors, load_checkpoint, load_config
from dflash_plugin.drafter.config import DrafterConfig, LatentAttentionConfig, build_config
from dflash_plugin.errors import DFlashError
from tests.helpers.tiny import DFLASH2, latent, tiny_config, write_tiny

SIZES = LatentAttentionConfig(
    q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7
)
LATENT = {**latent(SIZES), "rope": {"interleaved": True}}
# lightseekorg/kimi-k3-dflash2, as vLLM's pull request 57902 and TokenSpeed's tests have it.
KIMI: dict[str, Any] = {
    "architectures": ["DFlash2DraftModel"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 14336,
    "num_hidden_layers": 5,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "draft_vocab_size": 163840,
    "rms_norm_eps": 1e-05,
    "num_target_layers": 93,
    "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    "is_causal": False,
    "use_sliding_window": True,
    "sliding_window": 4096,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "dflash_config": {
        "block_size": 8,
        "attention_mode": "mla",
        "conv_kernel_size": 2,
        "conv_group_size": 16,
        "selector_rank": 256,
        "selector_top_k": 16,
        "target_layer_ids": [19, 37, 66, 78, 90],
        "mask_token_id": 163592,
    },
}
KIMI_ATTENTION = {
    "kv_a_layernorm.weight": (512,),
    "kv_a_proj_with_mqa.weight": (576, 7168),
    "kv_b_proj.weight": (16384, 512),
    "o_proj.weight": (7168, 8192),
    "q_a_layernorm.weight": (1536,),
    "q_a_proj.weight": (1536, 7168),
    "q_b_proj.weight": (12288, 1536),
}


def test_the_public_kimi_drafter():
    config = read_config(KIMI, {"embed_tokens.weight": (163840, 7168)})
    assert config.latent_attention == LatentAttentionConfig(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128,
    )  # fmt: skip
    assert (config.head_dim, config.num_key_value_heads, config.qk_norm) == (192, 64, False)
    assert (config.rope.theta, config.rope.interleaved) == (50000.0, True)
    assert [layer.sliding_window for layer in config.layers] == [4096] * 4 + [None]
    assert not any(layer.causal for layer in config.layers)
    # 0.1 * ln 32 + 1 is DeepSeek's mscale.
    assert config.attention_scale == pytest.approx(1.34657359**2 / 192**0.5)
    tensors = expected_tensors(config)
    prefix = "layers.4.self_attn."
    attention = {n.removeprefix(prefix): s for n, s in tensors.items() if n.startswith(prefix)}
    assert attention == KIMI_ATTENTION
    assert len(tensors) == 87


def read(directory: Path, draft: dict[str, Any] | None = None, **changes: Any) -> DrafterConfig:
    """The drafter of a checkpoint with changes to its config.json; None takes a key out."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw = {**raw, **changes, "dflash_config": {**raw["dflash_config"], **(draft or {})}}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return load_config(directory)


@pytest.mark.parametrize(
    ("draft", "changes", "message"),
    [
        ({}, {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({}, {"qk_nope_head_dim": None}, "attention_mode is 'mla', but qk_nope_head_dim is miss"),
        ({}, {"qk_rope_head_dim": None}, "qk_rope_head_dim is missing"),
        ({}, {"v_head_dim": None}, "v_head_dim is missing"),
        ({}, {"q_lora_rank": 0}, "q_lora_rank is 0: give an integer of at least 1"),
        ({}, {"qk_rope_head_dim": 3}, "qk_rope_head_dim 3 with partial_rotary_factor 1.0"),
        ({}, {"qk_nope_head_dim": -1}, "qk_nope_head_dim is -1"),
        ({}, {"q_lora_rank": None}, r"q_proj.weight' \[40, 32\] is missing"),
        ({}, {"v_head_dim": 8}, r"kv_b_proj.weight' has shape \[52, 10\] but"),
        ({"kv_lora_rank": 8}, {}, "dflash_config.kv_lora_rank is 8 and kv_lora_rank is 10"),
        ({"attention_mode": None}, {}, "kv_lora_rank is 10, of layers with latent attention"),
        ({"attention_mode": "lsa"}, {}, "dflash_config.attention_mode is 'lsa'"),
        ({"attention_modes": ["mla", "gqa"]}, {}, "dflash_config.attention_modes is"),
        ({"mla_use_output_gate": True}, {}, "dflash_config.mla_use_output_gate is true"),
        ({}, {"mla_use_nope": True}, "mla_use_nope is true"),
        ({"mla_rope_interleaved": False}, {}, "dflash_config.mla_rope_interleaved is False"),
        ({}, {"rope_interleave": False}, "is_neox_style is False"),
        ({}, {"qk_norm": True}, "qk_norm is True, but in layers with latent attention"),
        ({}, {"use_gemma_norm": True}, "norm_style is 'gemma', but in layers with latent"),
        ({"attention_sink_bias": True}, {}, "attention_sinks is True, but in layers with latent"),
        ({"attention_value_scale": 2.0}, {}, "attention_value_scale is 2.0, but in layers with"),
        ({}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)  # fmt: skip
def test_what_is_missing_or_contradicts_itself_is_refused_by_name(
    tmp_path, draft, changes, message
):
    directory = write_tiny(tmp_path, **LATENT)
    if "partial_rotary_factor" in changes:
        raw = json.loads((directory / "config.json").read_text())
        changes = {**changes, "rope_parameters": {**raw["rope_parameters"], **changes}}
    with pytest.raises(DFlashError, match=message):
        read(directory, draft, **changes)


def test_sizes_of_plain_layers_are_read_over_where_the_mode_is_given(tmp_path):
    directory = write_tiny(tmp_path)
    wanted = load_config(directory)
    found = read(directory, {"attention_mode": "gqa"}, kv_lora_rank=512, v_head_dim=128)
    assert found == wanted.model_copy(update={"dialect": "specforge"})


def test_head_counts_of_grouped_attention_say_nothing(tmp_path):
    directory = write_tiny(tmp_path, **LATENT)
    wanted = load_config(directory)
    assert read(directory, num_key_value_heads=3, head_dim=6) == wanted


@settings(max_examples=40, deadline=None)
@given(
    keys=st.dictionaries(
        st.sampled_from(["rope_interleave", "is_neox_style", "rope_is_neox_style"]), st.booleans()
    )
)
def test_the_rotation_is_of_pairs_unless_all_keys_say_otherwise(keys):
    said = {value != key.endswith("neox_style") for key, value in keys.items()}
    with TemporaryDirectory() as scratch:
        directory = write_tiny(Path(scratch) / "drafter", **LATENT)
        changes = {"rope_interleave": None, "is_neox_style": None, **keys}
        if len(said) > 1:
            with pytest.raises(DFlashError, match="leave out the one that the drafter"):
                read(directory, **changes)
        else:
            assert read(directory, **changes).rope.interleaved == (said != {False})


@pytest.mark.parametrize("dialect", ["z-lab", "specforge"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rank", [12, None])
def test_convert_keeps_the_drafter(tmp_path, dialect, interleaved, rank):
    sizes = SIZES.model_copy(update={"q_lora_rank": rank})
    changes = {
        **latent(sizes), "rope": {"interleaved": interleaved},
        "attention_bias": True, "attention_output_bias": True,
    }  # fmt: skip
    source = write_tiny(tmp_path / "source", **changes)
    written = convert(source, tmp_path / dialect, dialect)
    assert written == load_config(source).model_copy(update={"dialect": dialect})
    before, after = (load_checkpoint(p).tensors for p in (source, tmp_path / dialect))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_convert_keeps_a_dflash2_drafter(tmp_path):
    source = write_tiny(tmp_path / "source", **LATENT, **DFLASH2)
    config = convert(source, tmp_path / "copy", "z-lab")
    assert config.latent_attention == SIZES
    assert config.selector is not None


@pytest.mark.parametrize(
    ("dialect", "changes", "message"),
    [
        ("modelopt", {}, "latent_attention is"),
        ("speculators", {}, "latent_attention is"),
        ("z-lab", {"layers": ({"sliding_window": 5, "causal": True}, {})}, "only some layers are"),
    ],
)
def test_what_a_dialect_cannot_express_is_not_written(tmp_path, dialect, changes, message):
    with pytest.raises(DFlashError, match=message):
        write_tiny(tmp_path / "drafter", dialect, **LATENT, **changes)


def test_speculators_files_have_no_latent_attention(tmp_path):
    directory = write_tiny(tmp_path, "speculators")
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw["transformer_layer_config"]["kv_lora_rank"] = 512
    path.write_text(json.dumps(raw))
    with pytest.raises(DFlashError, match="kv_lora_rank is 512, of layers with latent attention"):
        load_config(directory)


@pytest.mark.parametrize(
    ("name", "value"), [("head_dim", 8), ("num_key_value_heads", 2), ("qk_norm", True)]
)
def test_a_configuration_that_does_not_fit_its_latent_attention_is_refused(name, value):
    values = tiny_config(**LATENT).model_dump()
    with pytest.raises(DFlashError, match=f"{name} is {value}, but in layers with latent"):
        build_config({**values, name: value})
