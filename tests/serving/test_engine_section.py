"""What engines are told of a quantised drafter."""

import pytest
import torch

from dflash_plugin.checkpoints.stored_weights import StoredWeights, stored_weights
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.engine_section import engine_section
from tests.helpers.quantised import COMPRESSED, LAYOUTS, groups, quantise
from tests.helpers.tiny import write_tiny


def section(tmp_path, kind):
    plain = write_tiny(tmp_path / "plain", intermediate_size=64)
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
    return engine_section(stored_weights(directory, headers_only=True))


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("W4A16", {}),
        ("int8", {"strategy": "channel"}),
        ("NVFP4", {"strategy": "tensor_group", "group_size": 16}),
        ("FP8 by channel", {"strategy": "channel"}),
    ],
)
def test_compressed_tensors_holds_for_every_linear(tmp_path, kind, strategy):
    """Where nothing is said, the tensors decide what has a scale of its own."""
    method, found = section(tmp_path, kind)
    said = LAYOUTS[kind].config
    assert (method, found["ignore"]) == ("compressed-tensors", [])
    assert found["format"] == said["format"]
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["re:.*"]
    expected = said["config_groups"]["group_0"]["weights"]
    assert group["weights"] == expected | strategy
    assert "strategy" not in expected


def test_a_scheme_keeps_its_own_words():
    group = groups("int", 8, strategy="tensor", dynamic=False)["group_0"]
    group |= {"targets": ["re:.*o_proj"], "input_activations": {"num_bits": 8}}
    declared = {**COMPRESSED, "format": "int-quantized", "config_groups": {"a": group}}
    stored = StoredWeights({}, {**declared, "ignore": ["fc"]}, {})
    _, found = engine_section(stored)
    assert found["config_groups"]["group_0"] == {**group, "targets": ["re:.*"]}
    assert group["targets"] == ["re:.*o_proj"]


@pytest.mark.parametrize(
    ("kind", "method", "expected"),
    [
        (
            "FP8 by block",
            "fp8",
            {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]},
        ),
        ("FP8 by tensor", "fp8", {"quant_method": "fp8", "activation_scheme": "static"}),
        (
            "ModelOpt NVFP4",
            "modelopt_fp4",
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": []},
        ),
    ],
)
def test_other_methods_say_what_the_engines_read(tmp_path, kind, method, expected):
    assert section(tmp_path, kind) == (method, expected)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {**COMPRESSED, "config_groups": {**groups("int", 8), "b": groups("int", 4)["group_0"]}},
            "names 2 schemes",
        ),
        (COMPRESSED, "names 0 schemes"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "'MIXED_PRECISION'"),
        ({}, "declares 'nothing'"),
    ],
)
def test_what_one_section_cannot_say(said, message):
    stored = StoredWeights({"fc": {"weight": torch.empty(2, 2)}}, said, {})
    with pytest.raises(DFlashError, match=message):
        engine_section(stored)
