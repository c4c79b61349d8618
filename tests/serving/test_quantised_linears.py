"""Quantised linears of a drafter, on an engine whose linears are made here."""

from __future__ import annotations

import logging
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.checkpoints.stored_weights import fp8_rows, stored_weights
from dflash_plugin.drafter import fp8_linear
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.fp8_rows import Fp8Rows
from dflash_plugin.serving.drafter_spec import DrafterSpec, Options
from dflash_plugin.serving.engine_drafter import EngineDrafterMixin
from dflash_plugin.serving.layers import EngineClasses, EngineLayers, QKVShard
from dflash_plugin.serving.quantised_linears import quantised_linears
from dflash_plugin.serving.weights import fill
from tests.helpers.quantised import LAYOUTS, quantise
from tests.helpers.tiny import write_tiny

KEPT = {"gate_up_proj", "down_proj", "output_proj"}
CPU = torch.device("cpu")
LOGGER = logging.getLogger("an_engine")


class Plain:
    """The engine's method of linears that are not quantised."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, layer.weight, bias)


class Int8:
    """A method of int8 weights with a scale a row."""

    factor = 1.0

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.factor * layer.weight.float() * layer.weight_scale
        return F.linear(x, weight.to(x.dtype), bias)


class Linear(nn.Module):
    """An engine's linear: rank ``rank`` of ``shards``, cut along ``dim``, or whole."""

    dim: int | None = None
    rank, shards = 0, 1

    def __init__(
        self, inputs: int, outputs: list[int] | int, *, bias: bool, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        sizes = [outputs] if isinstance(outputs, int) else outputs
        cut = [self.shards if dim == self.dim else 1 for dim in (0, 1)]
        self.sizes = [size // cut[0] for size in sizes]
        self.input_size, inputs = inputs, inputs // cut[1]
        self.output_size_per_partition = rows = sum(self.sizes)
        self.quant_method: Any = Plain() if quant_config is None else quant_config(prefix)
        shapes: dict[str, tuple[int, int]] = {"weight": (rows, inputs)}
        if not isinstance(self.quant_method, Plain):
            shapes["weight_scale"] = (rows, 1)
        for name, shape in shapes.items():
            is_codes = name == "weight" and len(shapes) > 1
            data = torch.zeros(shape, dtype=torch.int8 if is_codes else torch.float32)
            parameter: Any = nn.Parameter(data, requires_grad=False)
            parameter.weight_loader = partial(self.load, is_cut=self.dim == 0 or shape[1] > 1)
            self.register_parameter(name, parameter)

    def load(self, parameter: Any, tensor: Tensor, shard: Any = 0, *, is_cut: bool) -> None:
        index = "qkv".index(shard) if isinstance(shard, str) else shard
        start = sum(self.sizes[:index])
        into = parameter.data[start : start + self.sizes[index]]
        if self.dim is not None and tensor.shape != into.shape:
            tensor = tensor.chunk(self.shards, self.dim)[self.rank]
        assert tensor.shape == into.shape
        into.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.quant_method.apply(self, x, None)
        return out


class Column(Linear):
    dim = 0


class Row(Linear):
    dim = 1


class QKV(QKVShard, Column):
    plain_method = Plain

    def __init__(self, hidden: int, head_dim: int, heads: int, kv_heads: int, **given: Any):
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        super().__init__(hidden, sizes, **given)
        self.num_heads, self.head_size = heads // self.shards, head_dim


class EngineDrafter(EngineDrafterMixin, nn.Module):
    plain_linear = plain_head = Plain

    def __init__(self, spec: DrafterSpec, quantised: Any, rank: int = 0, shards: int = 1) -> None:
        super().__init__()
        self.spec, self.gather, self.quantised = spec, None, quantised
        kinds = [
            type(kind.__name__, (kind,), {"rank": rank, "shards": shards})
            for kind in (QKV, Column, Row, Linear)
        ]
        classes = EngineClasses(*kinds, nn.Linear)
        layers = EngineLayers(classes, shards, quantised, quant_config=None)
        self.drafter = Drafter(spec.config, layers).requires_grad_(False)
        fill(self.drafter, spec, rank, quantised)


def engine_int8(method: str, section: dict[str, Any]) -> Any:
    """The engine's configuration: a linear gets the method that this makes."""
    return lambda prefix: Int8()


@pytest.fixture
def pair(tmp_path):
    """A plain drafter, and the function that quantises it."""
    plain = write_tiny(tmp_path / "plain", intermediate_size=64)

    def quantised(kind: str, draft_weights: str = "checkpoint") -> DrafterSpec:
        directory = quantise(plain, tmp_path / "quantised", LAYOUTS[kind])
        config = load_checkpoint(directory).config
        options = Options(draft_weights=draft_weights)
        return DrafterSpec(checkpoint=directory, config=config, options=options)

    return plain, quantised


def block(drafter: Drafter) -> Tensor:
    """Hidden states of rows that attend to nothing but themselves."""
    size = drafter.config.hidden_size
    embedded = torch.randn(6, size, generator=torch.Generator().manual_seed(3))

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value.repeat_interleave(query.shape[-2] // value.shape[-2], dim=-2)

    return drafter.run_block(embedded, torch.arange(6), attend)


def kinds(drafter: Drafter, method: type) -> set[str]:
    """Which linears have a method."""
    return {
        name.rpartition(".")[2]
        for name, module in drafter.named_modules()
        if isinstance(getattr(module, "quant_method", None), method)
    }


def test_an_engines_linears_take_what_is_stored(pair, caplog):
    plain, quantised = pair
    spec = quantised("int8")
    with caplog.at_level("INFO"):
        kept = quantised_linears(spec, torch.bfloat16, CPU, engine_int8, LOGGER)
        found = EngineDrafter(spec, kept)
    kept.check()
    stored = load_checkpoint(spec.checkpoint, torch.float32)
    assert kinds(found.drafter, Int8) == KEPT
    weight: Any = found.drafter.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.int8
    assert weight.any()
    expected = EngineDrafter(spec.model_copy(update={"checkpoint": plain}), None)
    torch.testing.assert_close(block(found.drafter), block(expected.drafter))
    assert stored.config.quantization == "compressed-tensors int8"
    assert "down_proj, gate_up_proj, o_proj stay quantised (compressed-tensors int8)" in caplog.text
    # The fusion of features, and queries, keys and values of two layers.
    assert "7 quantised weights are dequantised, 0.00 GiB more" in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_takes_its_part(pair, rank):
    """Were it another's, the check would find unrelated numbers."""
    _, quantised = pair
    spec = quantised("int8")
    kept = quantised_linears(spec, torch.bfloat16, CPU, engine_int8, LOGGER)
    found = EngineDrafter(spec, kept, rank, 2)
    kept.check()
    stored = stored_weights(spec.checkpoint).modules
    mlp: Any = found.drafter.layers[0].mlp
    down = stored["layers.0.mlp.down_proj"]["weight"]
    assert torch.equal(mlp.down_proj.weight, down.chunk(2, 1)[rank])
    parts = [stored[f"layers.0.mlp.{part}_proj"]["weight_scale"] for part in ("gate", "up")]
    expected = torch.cat([part.chunk(2)[rank] for part in parts])
    assert torch.equal(mlp.gate_up_proj.weight_scale, expected)


@pytest.mark.parametrize("factor", [0.0, 2.0, float("nan")])
def test_a_linear_that_makes_something_else_ends_the_start(pair, monkeypatch, factor):
    _, quantised = pair
    spec = quantised("int8")
    kept = quantised_linears(spec, torch.bfloat16, CPU, engine_int8, LOGGER)
    EngineDrafter(spec, kept)
    monkeypatch.setattr(Int8, "factor", factor)
    with pytest.raises(DFlashError, match=r"layers\.0\..* \(Int8\) is off .* to 'dequantised'"):
        kept.check()


def no_kernel(prefix: str) -> Any:
    raise ValueError("there is no kernel\nfor this")


def refuses(method: str, section: dict[str, Any]) -> Any:
    raise KeyError("no such method")


@pytest.mark.parametrize(
    ("kind", "dtype", "engine", "obstacle", "why"),
    [
        ("int8", torch.bfloat16, lambda *_: no_kernel, None, "there is no kernel"),
        ("int8", torch.bfloat16, refuses, None, "no such method"),
        ("int8", torch.float32, engine_int8, None, "the drafter runs in float32"),
        ("int8", torch.bfloat16, engine_int8, "it needs a GPU", "it needs a GPU"),
        ("W4A16", torch.bfloat16, engine_int8, None, "linear wants weight, which is not stored"),
        (
            "int8 with zero points",
            torch.bfloat16,
            engine_int8,
            None,
            "linear does not read weight_zero_point",
        ),
    ],
)
def test_what_an_engine_lacks_is_dequantised(pair, caplog, kind, dtype, engine, obstacle, why):
    plain, quantised = pair
    spec = quantised(kind)
    with caplog.at_level("INFO"):
        kept = quantised_linears(spec, dtype, CPU, engine, LOGGER, obstacle)
        found = EngineDrafter(spec, kept)
    kept.check()
    assert kinds(found.drafter, Int8) == set()
    expected = EngineDrafter(spec.model_copy(update={"checkpoint": plain}), None)
    assert torch.equal(block(found.drafter), block(expected.drafter))
    assert re.search(f"GiB more than they are stored in: .*{why}", caplog.text)


def test_a_merged_linear_that_is_stored_in_one_tensor_is_dequantised(pair, caplog):
    _, quantised = pair
    spec = quantised("int8")
    path = spec.checkpoint / "model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        for part in ("weight", "weight_scale"):
            names = [f"layers.{layer}.mlp.{kind}_proj.{part}" for kind in ("gate", "up")]
            joined = torch.cat([tensors.pop(name) for name in names])
            tensors[f"layers.{layer}.mlp.gate_up_proj.{part}"] = joined
    save_file(tensors, path)
    with caplog.at_level("INFO"):
        kept = quantised_linears(spec, torch.bfloat16, CPU, engine_int8, LOGGER)
        found = EngineDrafter(spec, kept)
    kept.check()
    assert kinds(found.drafter, Int8) == KEPT - {"gate_up_proj"}
    assert caplog.text.count("gate_up_proj is stored in one tensor") == 1


@pytest.mark.parametrize("draft_weights", ["auto", "dequantised", "fp8"])
def test_other_options_ask_for_no_quantised_linears(pair, draft_weights):
    _, quantised = pair
    spec = quantised("int8", draft_weights)
    assert quantised_linears(spec, torch.bfloat16, CPU, engine_int8, LOGGER) is None


def test_a_plain_checkpoint_has_none(pair):
    plain, _ = pair
    config = load_checkpoint(plain).config
    spec = DrafterSpec(checkpoint=plain, config=config, options=Options(draft_weights="checkpoint"))
    assert quantised_linears(spec, torch.bfloat16, CPU, engine_int8, LOGGER) is None


@pytest.mark.parametrize("kind", ["FP8 by tensor", "ModelOpt FP8"])
@pytest.mark.parametrize("draft_weights", ["checkpoint", "fp8"])
@pytest.mark.parametrize(("rank", "shards"), [(0, 1), (1, 2)])
def test_fp8_rows_are_multiplied_as_they_are_stored(pair, kind, draft_weights, rank, shards):
    _, quantised = pair
    spec = quantised(kind, draft_weights)
    kept = quantised_linears(spec, torch.float32, CPU, engine_int8, LOGGER)
    assert kept is None
    found = EngineDrafter(spec, kept, rank, shards)
    found.prepare_weights()
    rows = fp8_rows(stored_weights(spec.checkpoint))
    layer: Any = found.drafter.layers[1]
    down = rows["layers.1.mlp.down_proj.weight"]
    assert torch.equal(
        layer.mlp.down_proj.weight.float(), down.values.chunk(shards, 1)[rank].float()
    )
    assert torch.equal(layer.mlp.down_proj.fp8_scales, down.scales)
    parts = [rows[f"layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    qkv: Any = layer.attention.qkv_proj
    values = torch.cat([part.values.chunk(shards)[rank].float() for part in parts])
    scales = torch.cat([part.scales.chunk(shards)[rank] for part in parts])
    assert torch.equal(qkv.weight.float(), values)
    assert torch.equal(qkv.fp8_scales, scales)
    context = found.context_weight
    assert isinstance(context, Fp8Rows)
    half = len(context.scales) // 2
    assert torch.equal(context.values[half:].float(), values[qkv.query_width :])
    assert torch.equal(context.scales[half:], scales[qkv.query_width :])
    assert not any(hasattr(module, "stored_rows") for module in found.drafter.modules())


@pytest.mark.parametrize("draft_weights", ["auto", "dequantised"])
def test_fp8_rows_are_dequantised_where_none_are_asked_for(pair, draft_weights, caplog):
    _, quantised = pair
    found = EngineDrafter(quantised("FP8 by tensor", draft_weights), None)
    with caplog.at_level("INFO"):
        found.prepare_weights()
    assert kinds(found.drafter, Plain) == {"fc", "qkv_proj", *KEPT}
    assert isinstance(found.context_weight, Tensor)
    assert ("dequantised (fp8), 0.00 GiB more" in caplog.text) is (draft_weights == "auto")


def test_a_gpu_without_fp8_leaves_fp8_to_the_engine(pair, monkeypatch):
    """The engine may have a linear that multiplies 16-bit rows."""
    _, quantised = pair
    spec = quantised("FP8 by tensor")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    assert fp8_linear.require_fp8(CPU) is None
    asked: list[str] = []

    def config(method: str, section: dict[str, Any]) -> Any:
        asked.append(method)
        return SimpleNamespace()

    kept = quantised_linears(spec, torch.bfloat16, torch.device("cuda"), config, LOGGER)
    assert kept is not None
    assert asked == ["fp8"]


def test_weights_alone_in_fp8_are_not_multiplied_by_rounded_rows(pair):
    _, quantised = pair
    spec = quantised("FP8 by channel")
    found = EngineDrafter(spec, quantised_linears(spec, torch.float32, CPU, engine_int8, LOGGER))
    found.prepare_weights()
    assert kinds(found.drafter, Plain) == {"fc", "qkv_proj", *KEPT}
