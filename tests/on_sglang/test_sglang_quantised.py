"""A quantised drafter's tensors in SGLang's own linears, by SGLang's own loaders.

The linears multiply on a GPU alone; here one is said to be there while they are made and filled.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs
from torch import nn

from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.checkpoints.stored_weights import fp8_rows, stored_weights
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.kernels.fp8_rows import Fp8Rows
from dflash_plugin.serving.drafter_spec import DrafterSpec, Options
from dflash_plugin.serving.engine_drafter import EngineDrafterMixin
from dflash_plugin.serving.quantised_linears import quantised_linears
from dflash_plugin.serving.weights import fill
from dflash_plugin.sglang.layers import SglangLayers, quant_config
from tests.helpers.http_server import free_port
from tests.helpers.quantised import LAYOUTS, W8A8, Layout, quantise
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.helpers.tiny import tiny_target, write_target, write_tiny

KEPT: dict[str, Layout] = {
    "W8A8": W8A8,
    "W4A16": LAYOUTS["W4A16"],
    "FP8 by block": LAYOUTS["FP8 by block"],
}


class EngineDrafter(EngineDrafterMixin, nn.Module):
    plain_linear = UnquantizedLinearMethod
    gather = None

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.spec = spec
        kept = quantised_linears(
            spec, torch.bfloat16, torch.device("cpu"), quant_config, logging.getLogger("sglang")
        )
        drafter = Drafter(spec.config, SglangLayers(None, kept))
        self.drafter = drafter.requires_grad_(False)
        fill(drafter, spec, 0, kept)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    directory = write_target(tmp_path_factory.mktemp("target"))
    tiny_target(**SIZES).save_pretrained(directory)
    address = f"tcp://127.0.0.1:{free_port()}"
    parallel_state.init_distributed_environment(
        backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=address
    )
    parallel_state.initialize_model_parallel(1)
    arguments = ServerArgs(model_path=str(directory), device="cpu", skip_tokenizer_init=True)
    publish(arguments, role="scheduler")
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def quantised(tmp_path, layout: Layout) -> DrafterSpec:
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        plain = write_tiny(tmp_path / "plain", **SIZES, target_hidden_size=64)
        directory = quantise(plain, tmp_path / "quantised", layout)
        torch.set_default_dtype(torch.bfloat16)
    options = Options(draft_weights="checkpoint")
    return DrafterSpec(checkpoint=directory, config=load_config(directory), options=options)


@pytest.mark.parametrize("kind", KEPT)
def test_sglangs_linears_take_what_is_stored(tmp_path, kind):
    spec = quantised(tmp_path, KEPT[kind])
    mlp: Any = EngineDrafter(spec).drafter.layers[1].mlp
    stored = stored_weights(spec.checkpoint).modules
    for linear, parts in ((mlp.down_proj, ["down"]), (mlp.gate_up_proj, ["gate", "up"])):
        assert not isinstance(linear.quant_method, UnquantizedLinearMethod)
        for name, parameter in linear.named_parameters():
            if name == "weight_shape":
                continue
            expected = [stored[f"layers.1.mlp.{part}_proj"][name] for part in parts]
            assert torch.equal(parameter.data, torch.cat(expected).to(parameter.dtype))


def test_fp8_rows_are_the_stored_ones(tmp_path):
    spec = quantised(tmp_path, LAYOUTS["FP8 by tensor"])
    drafter = EngineDrafter(spec)
    drafter.prepare_weights()
    rows = fp8_rows(stored_weights(spec.checkpoint))
    layer: Any = drafter.drafter.layers[1]
    for linear, names in (
        (layer.mlp.down_proj, ["mlp.down"]),
        (layer.attention.qkv_proj, [f"self_attn.{part}" for part in "qkv"]),
    ):
        parts = [rows[f"layers.1.{name}_proj.weight"] for name in names]
        values = torch.cat([part.values.float() for part in parts])
        assert torch.equal(linear.weight.float(), values)
        assert torch.equal(linear.fp8_scales, torch.cat([part.scales for part in parts]))
    assert isinstance(drafter.context_weight, Fp8Rows)
