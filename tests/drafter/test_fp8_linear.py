"""A drafter whose weights are rounded to FP8."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dflash_plugin import kernels
from dflash_plugin.drafter.fp8_linear import Fp8Linear, Fp8QKV, linear, linear_naive
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.fp8_rows import quantize
from dflash_plugin.serving.fp8_weights import Fp8Method, quantize_engine_drafter, quantized_head
from dflash_plugin.transformers import Engine, Request, load_drafter
from tests.helpers.kernel_helpers import error, random
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target, write_tiny

PROMPTS = [[5, 6, 7, 8, 9], [50, 51, 52], [20, 30, 40, 60, 70, 80]]


class Plain:
    """An engine's method of layers that are not quantized."""


def hosted_linear(width: int = 16) -> nn.Linear:
    layer = nn.Linear(width, width // 2, bias=False)
    layer.quant_method = Plain()
    return layer


@pytest.mark.parametrize(
    "changes",
    [{}, {"own_head": True, "attention_bias": True, "attention_output_bias": True}, DFLASH2],
)
def test_text_is_the_targets_own_and_drafts_are_close(tmp_path, changes):
    target = tiny_target()
    checkpoint = write_tiny(tmp_path, **changes)
    whole = load_drafter(checkpoint, target)
    rounded = load_drafter(checkpoint, target, weights="fp8")
    # Of the products only DFlash 2's small ones are left out, and the target keeps its head.
    plain = [name for name, m in rounded.named_modules() if isinstance(m, nn.Linear)]
    assert len(plain) == (5 if changes is DFLASH2 else 0)
    assert all("_conv." in name or "candidate_selector." in name for name in plain)
    assert sum(isinstance(m, Fp8QKV) for m in rounded.modules()) == 2
    assert isinstance(rounded.head(), Fp8Linear)
    assert isinstance(target.lm_head, nn.Linear)
    features = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, close = whole.fuse(features), rounded.fuse(features)
    assert 0 < (exact - close).norm() / exact.norm() < 0.05
    requests = [Request(prompt, 24, stop_ids=[]) for prompt in PROMPTS]
    alone = Engine(target, None, max_length=64).generate(requests)
    found = Engine(target, rounded, max_batch=3, max_length=64).generate(requests)
    assert [r.tokens for r in found] == [r.tokens for r in alone]


@pytest.mark.usefixtures("kernel_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [5, 23, 90])
def test_what_a_gpu_multiplies_is_the_twins(dtype, compiled, rows):
    """Rows that a kernel rounds, by our product or the library's, in a compiled model too."""
    weight = quantize(random(48, 64))
    x, bias = random(3, rows, 64, dtype=dtype, padding=8), random(48, dtype=dtype)
    with kernels.forced(False):
        expected = linear(x, weight, bias)

    def product(x: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, bias)

    run = torch.compile(product, fullgraph=True, backend="eager") if compiled else product
    out = run(x)
    assert out.dtype == dtype
    assert error(out, expected) < 5e-3
    assert run(x[:, :0]).shape == (3, 0, 48)


@pytest.mark.usefixtures("kernel_device")
def test_rows_that_the_library_does_not_take_are_multiplied_all_the_same():
    weight, x = quantize(random(7, 24)), random(5, 24)
    assert error(linear(x, weight), linear_naive(x, *weight)) < 1e-6


def test_an_engine_that_compiles_the_drafter_can_ask_for_kernels():
    def ask(x: torch.Tensor) -> torch.Tensor:
        return x + kernels.available(torch.device("cuda"))

    compiled = torch.compile(ask, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == kernels.available(torch.device("cuda"))


def test_keys_and_values_are_a_part_of_the_whole_projection(tmp_path):
    target = tiny_target()
    drafter = load_drafter(
        write_tiny(tmp_path, attention_bias=True, attention_output_bias=True), target, weights="fp8"
    )
    projection = drafter.attentions()[0].qkv_proj
    x = torch.randn(3, 32)
    assert torch.equal(projection.keys_values(x), projection(x)[:, projection.query_width :])


def test_an_engines_layers_are_rounded_in_place_and_its_head_in_a_copy():
    layer, head = hosted_linear(), hosted_linear()
    before = {one: one.weight.detach().clone() for one in (layer, head)}
    drafter = nn.Sequential(layer, nn.SiLU())
    drafter.own_head = None
    quantize_engine_drafter(drafter, Plain)
    x = torch.randn(3, 16)
    assert layer.weight.dtype == torch.float8_e4m3fn
    expected = linear(x, quantize(before[layer]))
    assert torch.equal(layer.quant_method.apply(layer, x), expected)
    copied = quantized_head(head, Plain, own=False)
    assert isinstance(copied.quant_method, Fp8Method)
    assert torch.equal(head.weight, before[head])
    assert isinstance(head.quant_method, Plain)
    assert torch.equal(copied.quant_method.apply(copied, x), linear(x, quantize(before[head])))


def test_the_parts_of_dflash2_keep_their_projections():
    drafter = tiny_drafter(**DFLASH2)
    for module in drafter.modules():
        if isinstance(module, nn.Linear):
            module.quant_method = Plain()
    quantize_engine_drafter(drafter, Plain)
    kept = {
        name
        for name, module in drafter.named_modules()
        if isinstance(getattr(module, "quant_method", None), Plain)
    }
    assert kept == {
        "candidate_selector.hidden_projection",
        *(
            f"layers.{i}.{part}_conv.kernel_projection"
            for i in (0, 1)
            for part in ("attention", "mlp")
        ),
    }


@pytest.mark.usefixtures("kernel_device")
def test_a_compiled_layer_reads_its_weights_anew():
    layer = hosted_linear(32)
    drafter = nn.Sequential(layer)
    drafter.own_head = None
    quantize_engine_drafter(drafter, Plain)
    run = torch.compile(
        lambda x: layer.quant_method.apply(layer, x), fullgraph=True, backend="eager"
    )
    x = random(3, 32)
    before = run(x).clone()
    layer.fp8_scales.mul_(2.0)
    assert error(run(x), 2 * before) < 1e-6


def test_layers_that_are_quantized_already():
    layer = hosted_linear()
    layer.quant_method = SimpleNamespace()
    drafter = nn.Sequential(layer)
    drafter.own_head = None
    with pytest.raises(DFlashError, match="the checkpoint quantizes 0 with SimpleNamespace"):
        quantize_engine_drafter(drafter, Plain)
    assert quantized_head(layer, Plain, own=False) is layer
