"""Quantised weights as they are stored: FP8 rows bit for bit, and how much they take."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.stored_weights import elements, fp8_rows, stored_weights
from tests.helpers import quantised
from tests.helpers.quantised import COMPRESSED, LAYOUTS, Layout, groups, quantise
from tests.helpers.tiny import write_tiny

# Sides that groups of 32 divide.
SIZES = {"intermediate_size": 64}
ROWS = ["FP8 by tensor", "FP8 by channel", "ModelOpt FP8"]


@pytest.mark.parametrize("kind", ROWS)
def test_fp8_rows_are_the_stored_numbers(tmp_path, kind):
    plain = write_tiny(tmp_path / "plain", **SIZES)
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
    stored = stored_weights(directory)
    expected = load_checkpoint(plain).tensors
    rows = fp8_rows(stored)
    assert {name for name in expected if quantised.is_linear(name)} == rows.keys()
    for name, found in rows.items():
        module = name.removesuffix(".weight")
        assert torch.equal(found.values.float(), stored.modules[module]["weight"].float())
        assert found.scales.dtype == torch.float32
        assert torch.equal(found.values.float() * found.scales[:, None], expected[name])


@pytest.mark.parametrize("kind", sorted(LAYOUTS.keys() - set(ROWS)))
def test_other_layouts_have_no_fp8_rows(tmp_path, kind):
    plain = write_tiny(tmp_path / "plain", **SIZES)
    stored = stored_weights(quantise(plain, tmp_path / "quantised", LAYOUTS[kind]))
    assert stored.modules
    # A weight of one block has one scale.
    one_block = {
        f"layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "kv"
    }
    assert fp8_rows(stored).keys() == (one_block if kind == "FP8 by block" else set())


def test_a_fused_weight_is_split_with_the_scales_of_its_parts(tmp_path):
    plain = write_tiny(tmp_path / "plain")
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS["FP8 by tensor"])
    tensors = load_file(directory / "model.safetensors")
    name = "layers.0.self_attn"
    parts = [f"{name}.{part}_proj" for part in "qkv"]
    separate = fp8_rows(stored_weights(directory))
    for kind, join in (("weight", torch.cat), ("weight_scale", torch.stack)):
        joined = join([tensors.pop(f"{part}.{kind}") for part in parts])
        tensors[f"{name}.qkv_proj.{kind}"] = joined
    save_file(tensors, directory / "model.safetensors")
    rows = fp8_rows(stored_weights(directory))
    assert rows.keys() == separate.keys()
    for part in parts:
        for one, other in zip(rows[f"{part}.weight"], separate[f"{part}.weight"], strict=True):
            assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("headers_only", [False, True])
def test_a_weight_stands_for_so_many_numbers(tmp_path, kind, headers_only):
    plain = write_tiny(tmp_path / "plain", **SIZES)
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
    stored = stored_weights(directory, headers_only=headers_only)
    for module, parts in stored.modules.items():
        assert elements(parts) == load_checkpoint(plain).tensors[f"{module}.weight"].numel()


def test_scales_of_activations_belong_to_their_weight(tmp_path):
    plain = write_tiny(tmp_path / "plain")
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS["FP8 by tensor"])
    tensors = load_file(directory / "model.safetensors")
    tensors["fc.input_scale"] = torch.tensor(0.5)
    tensors["layers.0.self_attn.k_scale"] = torch.tensor(0.5)
    save_file(tensors, directory / "model.safetensors")
    stored = stored_weights(directory)
    assert stored.modules["fc"].keys() == {"weight", "weight_scale", "input_scale"}
    assert "layers.0.self_attn" not in stored.modules


TOKEN = {"input_activations": {"type": "float", "num_bits": 8}}


@pytest.mark.parametrize(
    ("section", "method", "rounds"),
    [
        (None, "", False),
        (LAYOUTS["FP8 by channel"].config, "compressed-tensors", False),
        ({"config_groups": groups("float", 8)}, "compressed-tensors", False),
        (
            {**COMPRESSED, "config_groups": {"a": {**groups("float", 8)["group_0"], **TOKEN}}},
            "compressed-tensors",
            True,
        ),
        (LAYOUTS["FP8 by tensor"].config, "fp8", True),
        (LAYOUTS["ModelOpt FP8"].config, "modelopt", True),
    ],
)
def test_what_a_checkpoint_says_of_its_activations(tmp_path, section, method, rounds):
    layout = Layout(quantised.fp8_channels, section, "")
    stored = stored_weights(quantise(write_tiny(tmp_path / "plain"), tmp_path / "q", layout))
    assert stored.method == method
    assert stored.rounds_activations is rounds


def test_modelopts_own_file_says_the_algorithm(tmp_path):
    layout = LAYOUTS["ModelOpt NVFP4"]._replace(config=None)
    directory = quantise(write_tiny(tmp_path / "plain", **SIZES), tmp_path / "q", layout)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (directory / "hf_quant_config.json").write_text(json.dumps(said))
    stored = stored_weights(directory)
    assert (stored.method, stored.section["quant_algo"]) == ("modelopt", "NVFP4")
