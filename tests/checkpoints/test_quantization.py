"""Quantised weights load as the plain ones that they stand for, and unknown layouts are refused."""

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dflash_plugin.checkpoints.convert import convert
from dflash_plugin.checkpoints.inspection import inspect_checkpoint
from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.checkpoints.quantization import dequantise
from dflash_plugin.checkpoints.quantization_config import Declared
from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers.loading import load_drafter
from tests.checkpoints.test_io import edit, retensor
from tests.helpers import quantised
from tests.helpers.quantised import LAYOUTS, quantise
from tests.helpers.tiny import tiny_config, tiny_target, tiny_tensors, write_tiny

Q_PROJ = "layers.0.self_attn.q_proj"
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
SIZES = {"intermediate_size": 48}


def no_parts(name, rows):
    return []


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_quantised_drafter_is_the_plain_one_that_it_stands_for(target, tmp_path, kind):
    layout = LAYOUTS[kind]
    plain = write_tiny(tmp_path / "plain", **SIZES)
    original = load_checkpoint(plain)
    directory = quantise(plain, tmp_path / "quantised", layout)
    found, expected = load_checkpoint(directory), load_checkpoint(plain)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected.tensors[name])
        if quantised.is_linear(name):
            step = layout.quantise(original.tensors[name]).step
            error = (tensor - original.tensors[name]).abs()
            assert error.max() > 0
            assert (error <= step).all()
    assert found.config == load_config(directory)
    assert found.config.quantization == layout.named
    assert found.config == expected.config.model_copy(update={"quantization": layout.named})
    drafted = answer(load_drafter(directory, target), target, PROMPT)
    assert drafted == answer(load_drafter(plain, target), target, PROMPT)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    group=st.sampled_from([8, 16, 32]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_packed_integers_of_any_shape(rows, groups, group, bits, symmetric, dtype, seed):
    weight = torch.randn(rows, groups * group, generator=torch.Generator().manual_seed(seed))
    made = quantised.packed(weight, bits, group, symmetric)
    stored = {f"{Q_PROJ}.{part}": tensor for part, tensor in made.parts.items()}
    stored["norm.weight"] = torch.ones(4, dtype=dtype)
    found = dequantise(stored, Declared(), no_parts).tensors
    assert torch.equal(found[f"{Q_PROJ}.weight"], made.value.to(dtype))
    assert ((made.value - weight).abs() <= made.step).all()
    shapes = {
        name: tensor if name.endswith("shape") else tensor.to("meta")
        for name, tensor in stored.items()
    }
    assert (
        dequantise(shapes, Declared(), no_parts).tensors[f"{Q_PROJ}.weight"].shape == weight.shape
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block=st.sampled_from([(128, 128), (16, 32), (1, 64)]),
    seed=st.integers(0, 9),
)
def test_fp8_blocks_of_any_shape(rows, columns, block, seed):
    """The last block of a row or column may be cut."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made = quantised.fp8(weight, *block, "weight_scale_inv")
    stored = {f"{Q_PROJ}.{part}": tensor for part, tensor in made.parts.items()}
    stored["norm.weight"] = torch.ones(4)
    found = dequantise(stored, Declared(block=block), no_parts).tensors
    assert torch.equal(found[f"{Q_PROJ}.weight"], made.value)
    assert ((made.value - weight).abs() <= made.step).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), groups=st.integers(1, 6), modelopt=st.booleans())
def test_fp4_of_any_shape(rows, groups, modelopt):
    weight = torch.randn(rows, 16 * groups, generator=torch.Generator().manual_seed(rows))
    made = quantised.nvfp4(weight, modelopt)
    stored = {f"{Q_PROJ}.{part}": tensor for part, tensor in made.parts.items()}
    stored["norm.weight"] = torch.ones(4)
    found = dequantise(stored, Declared(), no_parts).tensors
    assert torch.equal(found[f"{Q_PROJ}.weight"], made.value)
    assert ((made.value - weight).abs() <= made.step).all()


def test_the_scale_of_a_modelopt_block_may_have_four_dimensions():
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    made = quantised.fp8(weight, 128, 128)
    stored = {"fc.weight": made.parts["weight"], "norm.weight": torch.ones(4)}
    stored["fc.weight_scale"] = made.parts["weight_scale"][:, None, :, None]
    found = dequantise(stored, Declared("modelopt"), no_parts)
    assert torch.equal(found.tensors["fc.weight"], made.value)
    assert found.quantization == "modelopt FP8"


@pytest.mark.parametrize("scales", ["tensor", "part", "row", "group"])
@pytest.mark.parametrize("fused", ["qkv_proj", "gate_up_proj"])
def test_scales_of_fused_weights(tmp_path, fused, scales):
    """One for all, one for each part or for each row, and groups, which are split along."""
    plain = write_tiny(tmp_path, **SIZES)
    parts = ("q_proj", "k_proj", "v_proj") if fused == "qkv_proj" else ("gate_proj", "up_proj")
    layer = "layers.0.self_attn" if fused == "qkv_proj" else "layers.0.mlp"
    expected = {}

    def fuse(tensors):
        names = [f"{layer}.{part}.weight" for part in parts]
        weights = [tensors.pop(name) for name in names]
        whole = torch.cat(weights)
        if scales == "group":
            made = quantised.packed(whole, 4, 16)
        elif scales == "part":
            each = [quantised.fp8_tensor(weight) for weight in weights]
            value = torch.cat([one.value for one in each])
            joined = {
                "weight": torch.cat([one.parts["weight"] for one in each]),
                "weight_scale": torch.stack([one.parts["weight_scale"] for one in each]),
            }
            made = quantised.Quantised(joined, value, value)
        else:
            made = (quantised.fp8_tensor if scales == "tensor" else quantised.fp8_channels)(whole)
        tensors |= {f"{layer}.{fused}.{part}": value for part, value in made.parts.items()}
        split = made.value.split([len(weight) for weight in weights])
        expected.update(zip(names, split, strict=True))

    retensor(plain, fuse)
    found = load_checkpoint(plain).tensors
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    assert load_config(plain).quantization is not None


def test_the_dtype_is_that_of_the_plain_tensors(tmp_path):
    config = tiny_config(**SIZES)
    plain = write_tiny(tmp_path, **SIZES)
    tensors = {name: tensor.bfloat16() for name, tensor in tiny_tensors(config).items()}
    made = quantised.fp8_channels(tensors.pop("fc.weight").float())
    tensors |= {f"fc.{part}": value for part, value in made.parts.items()}
    save_file(tensors, plain / "model.safetensors")
    found = load_checkpoint(plain)
    assert found.config.dtype == "bfloat16"
    assert torch.equal(found.tensors["fc.weight"], made.value.bfloat16())


@pytest.fixture
def packed(tmp_path):
    plain = write_tiny(tmp_path / "plain", **SIZES)
    return quantise(plain, tmp_path / "quantised", LAYOUTS["W4A16"])


@pytest.mark.parametrize("place", ["compression_config", "none"])
def test_where_the_quantisation_is_declared(packed, place):
    said = LAYOUTS["W4A16"].config
    edit(packed, quantization_config=None, **({} if place == "none" else {place: said}))
    assert load_config(packed).quantization == "compressed-tensors W4A16"
    if place != "none":
        edit(packed, compression_config={**said, "format": "marlin-24"})
        with pytest.raises(DFlashError, match="compression_config names the format 'marlin-24'"):
            load_config(packed)


def test_a_declaration_in_the_layers_section_counts(packed, tmp_path):
    written = write_tiny(tmp_path / "speculators", "speculators", **SIZES)
    save_file(load_file(packed / "model.safetensors"), written / "model.safetensors")
    said = LAYOUTS["W4A16"].config
    edit(written, transformer_layer_config__quantization_config=said)
    assert load_checkpoint(written).config.quantization == "compressed-tensors W4A16"
    edit(written, transformer_layer_config__quantization_config={**said, "quant_method": "awq"})
    with pytest.raises(
        DFlashError, match=r"transformer_layer_config\.quantization_config names the method 'awq'"
    ):
        load_config(written)


def test_modelopts_own_file_counts(tmp_path):
    plain = write_tiny(tmp_path / "plain", **SIZES)
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS["ModelOpt NVFP4"])
    edit(directory, quantization_config=None)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (directory / "hf_quant_config.json").write_text(json.dumps(said))
    assert load_config(directory).quantization == "modelopt NVFP4"
    said["quantization"]["quant_algo"] = "W4A8_AWQ"
    (directory / "hf_quant_config.json").write_text(json.dumps(said))
    with pytest.raises(DFlashError, match=r"hf_quant_config\.json names quant_algo 'W4A8_AWQ'"):
        load_config(directory)


def test_a_declaration_without_quantised_tensors_is_a_plain_checkpoint(tmp_path):
    plain = write_tiny(tmp_path)
    edit(plain, quantization_config=LAYOUTS["W4A16"].config)
    assert load_checkpoint(plain).config.quantization is None


def test_scales_of_activations_and_caches_are_ignored_and_said(tmp_path, caplog):
    plain = write_tiny(tmp_path / "plain", **SIZES)
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS["FP8 by tensor"])
    names = (
        f"{Q_PROJ}.input_scale",
        "layers.0.self_attn.k_proj.k_scale",
        "layers.0.self_attn.v_scale",
        "layers.1.self_attn.attn.k_scale",
        "layers.1.mlp.up_proj.input_global_scale",
    )
    retensor(directory, lambda t: t.update({name: torch.ones(1) for name in names}))
    with caplog.at_level(logging.INFO, "dflash_plugin"):
        found = load_checkpoint(directory)
    assert "is quantised (fp8): dequantised at load" in caplog.text
    assert "5 scales of activations and of the KV cache are ignored" in caplog.text
    expected = load_checkpoint(plain)
    assert all(torch.equal(found.tensors[n], t) for n, t in expected.tensors.items())


def part(name, change):
    """A change of one tensor of a projection; None takes it out."""

    def spoil(tensors):
        value = change(tensors.get(f"{Q_PROJ}.{name}"))
        if value is None:
            tensors.pop(f"{Q_PROJ}.{name}")
        else:
            tensors[f"{Q_PROJ}.{name}"] = value

    return lambda directory: retensor(directory, spoil)


def extra(name, dtype=torch.float32):
    return lambda directory: retensor(
        directory, lambda t: t.__setitem__(name, torch.ones(2, 2, dtype=dtype))
    )


def config(**said):
    return lambda directory: edit(directory, quantization_config=said)


REFUSED = {
    "gptq": ("W4A16", config(quant_method="gptq", bits=4), "the method 'gptq'"),
    "awq": ("W4A16", config(quant_method="awq"), "the method 'awq'"),
    "bitsandbytes": ("int8", config(quant_method="bitsandbytes"), "the method 'bitsandbytes'"),
    "mxfp4": ("NVFP4", config(quant_method="mxfp4"), "the method 'mxfp4'"),
    "no method": ("int8", config(bits=8), "has no quant_method"),
    "not an object": ("int8", lambda d: edit(d, quantization_config=[1]), r"is \[1\], not a JSON"),
    "e5m2": ("FP8 by tensor", config(quant_method="fp8", fmt="e5m2"), "fmt 'e5m2'"),
    "blocks": (
        "FP8 by block",
        config(quant_method="fp8", weight_block_size=[128]),
        r"blocks of \[128\]",
    ),
    "other blocks": (
        "FP8 by block",
        config(quant_method="fp8", weight_block_size=[8, 8]),
        r"weight_scale_inv' has shape \[\d, \d\], which does not fit",
    ),
    "mxfp8": (
        "FP8 by channel",
        config(**quantised.COMPRESSED, format="mxfp8-quantized"),
        "the format 'mxfp8-quantized'",
    ),
    "format of a group": (
        "W4A16",
        config(**quantised.COMPRESSED, config_groups={"a": {"format": "mxfp4-pack-quantized"}}),
        "the format 'mxfp4-pack-quantized'",
    ),
    "sparse": (
        "W4A16",
        config(**quantised.COMPRESSED, sparsity_config={"format": "sparse-24-bitmask"}),
        "the sparsity format 'sparse-24-bitmask'",
    ),
    "transforms": (
        "W4A16",
        config(**quantised.COMPRESSED, transform_config={"config_groups": {"R1": {}}}),
        "transform_config",
    ),
    "three bits": (
        "W4A16",
        config(**quantised.COMPRESSED, config_groups=quantised.groups("int", 3)),
        "num_bits 3",
    ),
    "other bits": (
        "W4A16",
        config(**quantised.COMPRESSED, config_groups=quantised.groups("int", 8)),
        "weight_packed' has shape .*numbers of 8 bits",
    ),
    "zero points missing": (
        "W4A16",
        config(**quantised.COMPRESSED, config_groups=quantised.groups("int", 4, symmetric=False)),
        "weight_zero_point', which belongs to .* is missing",
    ),
    "modelopt awq": (
        "ModelOpt NVFP4",
        config(quant_method="modelopt", quant_algo="NVFP4_AWQ"),
        "quant_algo 'NVFP4_AWQ'",
    ),
    "modelopt layer": (
        "ModelOpt FP8",
        config(
            quant_method="modelopt",
            quant_algo="MIXED_PRECISION",
            quantized_layers={"fc": {"quant_algo": "MXFP8"}},
        ),
        "quant_algo 'MXFP8'",
    ),
    "two methods": (
        "FP8 by tensor",
        lambda d: (d / "hf_quant_config.json").write_text('{"quantization": {}}'),
        "quantization_config says 'fp8' but hf_quant_config.json says 'modelopt'",
    ),
    "scale missing": ("W4A16", part("weight_scale", lambda t: None), "weight_scale'.* is missing"),
    "only a scale": ("int8", part("weight", lambda t: None), "q_proj.weight'.* is missing"),
    "shape missing": ("W4A16", part("weight_shape", lambda t: None), "weight_shape'.* is missing"),
    "shape of three": (
        "W4A16",
        part("weight_shape", lambda t: torch.tensor([1, 2, 3])),
        r"holds \[1, 2, 3\], not a shape",
    ),
    "packed too few": (
        "W4A16",
        part("weight_packed", lambda t: t[:, 1:].contiguous()),
        r"weight_packed' has shape \[32, 3\], which does not fit 32 x 32 numbers of 4 bits",
    ),
    "groups that do not divide": (
        "W4A16",
        part("weight_scale", lambda t: torch.ones(32, 3)),
        r"weight_scale' has shape \[32, 3\]",
    ),
    "scale of another tensor": (
        "int8",
        part("weight_scale", lambda t: t[1:].contiguous()),
        r"weight_scale' has shape \[31, 1\]",
    ),
    "empty scale": ("int8", part("weight_scale", lambda t: t[:0]), r"has shape \[0, 1\]"),
    "scale of integers": (
        "int8",
        part("weight_scale", lambda t: t.to(torch.int64)),
        "weight_scale' is int64, not float32",
    ),
    "MXFP8 scale": (
        "FP8 by channel",
        part("weight_scale", lambda t: torch.ones(32, 1, dtype=torch.uint8)),
        "weight_scale' is uint8, not float32",
    ),
    "zero point of another shape": (
        "int8 with zero points",
        part("weight_zero_point", lambda t: t[1:].contiguous()),
        "weight_zero_point' has shape",
    ),
    "packed zero point of another shape": (
        "W4A16 with zero points",
        part("weight_zero_point", lambda t: t[1:].contiguous()),
        r"weight_zero_point' has shape \[3, 2\], which does not fit 32 x 2 numbers of 4 bits",
    ),
    "FP4 scales": (
        "NVFP4",
        part("weight_scale", lambda t: t[:, 1:].contiguous()),
        r"weight_scale' has shape \[32, 1\], which does not fit groups of 16",
    ),
    "FP4 without the scale of all": (
        "NVFP4",
        part("weight_global_scale", lambda t: None),
        "weight_global_scale'.* is missing",
    ),
    "MXFP4 scales": (
        "NVFP4",
        part("weight_scale", lambda t: t.view(torch.uint8)),
        "weight_scale' beside .* is uint8, not float8_e4m3fn",
    ),
    "ModelOpt without the second scale": (
        "ModelOpt NVFP4",
        part("weight_scale_2", lambda t: None),
        "weight_scale_2'.* is missing",
    ),
    "ModelOpt FP4 with a scale of groups": (
        "ModelOpt NVFP4",
        part("weight_scale_2", lambda t: torch.ones(32, 2)),
        "weight_scale_2' has shape",
    ),
    "e5m2 weight": (
        "FP8 by tensor",
        part("weight", lambda t: t.to(torch.float8_e5m2)),
        "q_proj.weight' beside .*weight_scale' is float8_e5m2",
    ),
    "a scale beside a plain weight": (
        "FP8 by tensor",
        part("weight", lambda t: t.float()),
        "q_proj.weight' beside .*weight_scale' is float32",
    ),
    "two scales": (
        "FP8 by tensor",
        part("weight_scale_inv", lambda t: torch.ones(())),
        r"weight_scale' does not belong to its layout \(FP8\)",
    ),
    "packed beside plain": (
        "W4A16",
        part("weight", lambda t: torch.ones(32, 32)),
        "q_proj.weight' does not belong to its layout",
    ),
    "columns out of order": ("W4A16", extra(f"{Q_PROJ}.weight_g_idx"), "weight_g_idx' belongs to"),
    "gptq tensors": ("W4A16", extra("layers.0.mlp.up_proj.qweight"), "GPTQ's or AWQ's layout"),
    "bitsandbytes tensors": ("int8", extra(f"{Q_PROJ}.weight.absmax"), "bitsandbytes' layout"),
    "mxfp4 tensors": ("int8", extra("layers.0.mlp.gate_up_proj_blocks"), "the MXFP4 layout"),
    "smoothing of AWQ": ("ModelOpt NVFP4", extra(f"{Q_PROJ}.pre_quant_scale"), "AWQ layout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case, tmp_path):
    kind, spoil, message = REFUSED[case]
    plain = write_tiny(tmp_path / "plain", **SIZES)
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
    spoil(directory)
    for read in (load_config, load_checkpoint):
        with pytest.raises(DFlashError, match=message) as caught:
            read(directory)
        assert "the weights are quantised" in str(caught.value)
        assert "DFLASH_PLUGIN=off leaves the drafter to the engine" in str(caught.value)


def test_scales_that_overflow_are_refused(packed):
    retensor(packed, lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(float("inf")))
    with pytest.raises(DFlashError, match=r"q_proj\.weight' has values that are not finite"):
        load_checkpoint(packed)


@pytest.mark.parametrize("kind", ["NVFP4", "ModelOpt NVFP4"])
@pytest.mark.parametrize("number", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_of_all_that_is_no_scale_is_refused_before_weights_are_read(tmp_path, kind, number):
    plain = write_tiny(tmp_path / "plain", **SIZES)
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
    part = "weight_scale_2" if "ModelOpt" in kind else "weight_global_scale"
    retensor(directory, lambda t: t[f"{Q_PROJ}.{part}"].fill_(number))
    for read in (load_config, load_checkpoint):
        with pytest.raises(DFlashError, match=rf"q_proj\.{part}' holds .*, no scale"):
            read(directory)


def test_a_scale_without_dimensions_beside_zero_points(tmp_path):
    plain = write_tiny(tmp_path / "plain", **SIZES)
    kind = LAYOUTS["W4A16 with zero points"]
    directory = quantise(plain, tmp_path / "quantised", kind)
    name = f"{Q_PROJ}.weight_scale"
    retensor(directory, lambda t: t.update({name: t[name].flatten()[0].clone()}))
    with pytest.raises(DFlashError, match=r"weight_zero_point' has shape .* does not fit"):
        load_config(directory)


def test_scales_that_are_powers_of_two_in_a_byte(tmp_path):
    """float8_e8m0fnu, as DeepSeek's newer FP8 checkpoints store them."""
    plain = write_tiny(tmp_path / "plain", **SIZES)
    directory = quantise(plain, tmp_path / "quantised", LAYOUTS["FP8 by block"])
    name = f"{Q_PROJ}.weight_scale_inv"

    def rounded(tensors):
        scale = tensors[name].to(torch.float8_e8m0fnu)
        tensors[name] = scale if rounded.small else scale.float()

    found = []
    for rounded.small in (False, True):
        retensor(directory, rounded)
        found.append(load_checkpoint(directory).tensors[f"{Q_PROJ}.weight"])
    assert torch.equal(*found)


def test_inspect_names_it_and_convert_writes_plain_weights(packed, tmp_path):
    report = inspect_checkpoint(packed)
    assert report.config.quantization == "compressed-tensors W4A16"
    (note,) = [finding for finding in report.findings if finding.subject == "quantization"]
    assert note.level == "note"
    assert "quantised (compressed-tensors W4A16)" in note.message
    plain = load_checkpoint(tmp_path / "plain")
    assert report.parameters == sum(tensor.numel() for tensor in plain.tensors.values())
    written = convert(packed, tmp_path / "converted", "modelopt")
    assert written.quantization is None
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    assert stored.keys() == plain.tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in plain.tensors.items())
    assert "quantization_config" not in json.loads(
        (tmp_path / "converted" / "config.json").read_text()
    )
