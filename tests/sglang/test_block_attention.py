"""Attention under SGLang's Triton back end, with made-up metadata: it needs no SGLang."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.sglang import compat, triton_attention
from tests.helpers.kernel_helpers import DEVICE, error, integers, random

pytestmark = pytest.mark.usefixtures("kernel_device")
LENGTHS, ROWS, HEADS, KV_HEADS, DIM = (0, 5, 90), 4, 6, 2, 16
TOKENS = ROWS * len(LENGTHS)
# Their rows of the table.
REQUESTS = (4, 0, 3)


class AttentionType(Enum):
    """SGLang's."""

    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class MHATokenToKVPool:
    """A pool as SGLang makes it for one layer."""

    dtype = store_dtype = torch.float32
    is_quantized_kv_cache = use_hnd = False

    def __init__(self) -> None:
        self.k_buffer, self.v_buffer = ([random(256, KV_HEADS, DIM, seed=seed)] for seed in (1, 2))

    def get_key_buffer(self, layer: int) -> Tensor:
        return self.k_buffer[layer]

    def get_value_buffer(self, layer: int) -> Tensor:
        return self.v_buffer[layer]

    def set_kv_buffer(self, layer: Any, slots: Tensor, key: Tensor, value: Tensor) -> None:
        self.k_buffer[layer.layer_id][slots] = key
        self.v_buffer[layer.layer_id][slots] = value


class TritonAttnBackend:
    """A back end in a verify pass; its own attention only says that it was asked."""

    dcp_size, enable_deterministic, _translate_kv_loc = 1, False, None

    def __init__(self, **changes: Any) -> None:
        self.token_to_kv_pool = MHATokenToKVPool()
        self.slots = torch.randperm(255, generator=torch.Generator().manual_seed(0), device="cpu")
        self.slots = (self.slots + 1).to(DEVICE)
        self.req_to_token = integers(0, 256, 6, 100).int()
        for row, slots in zip(REQUESTS, self.contexts(), strict=True):
            self.req_to_token[row, : len(slots)] = slots
        self.forward_metadata = SimpleNamespace(
            **{"custom_mask": None, "max_extend_len": ROWS, **changes}
        )
        self.natively, self.filled = 0, 0

    def contexts(self) -> list[Tensor]:
        """The slots of every request's context."""
        ends = torch.tensor(LENGTHS, device="cpu").cumsum(0).tolist()
        return [self.slots[end - length : end] for end, length in zip(ends, LENGTHS, strict=True)]

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        self.filled += 1

    def forward_extend(self, *_: Any, **__: Any) -> Tensor:
        self.natively += 1
        return torch.zeros(())


def layer_of(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "tp_q_head_num": HEADS, "tp_k_head_num": KV_HEADS, "qk_head_dim": DIM, "v_head_dim": DIM,
        "layer_id": 0, "scaling": 0.25, "sliding_window_size": -1, "attn_type": "decoder",
        "logit_cap": 0.0, "k_scale": None, "is_cross_attention": False, "xai_temperature_len": -1,
    }  # fmt: skip
    values.update(changes)
    return SimpleNamespace(**{**values, "attn_type": AttentionType(values["attn_type"])})


def batch_of(backend: TritonAttnBackend, verifies: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_target_verify=lambda: verifies),
        out_cache_loc=backend.slots[200 : 200 + TOKENS],
        seq_lens=torch.tensor(LENGTHS),
        req_pool_indices=torch.tensor(REQUESTS),
        _attn_output=None,
    )


def block() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one merged projection."""
    merged = random(TOKENS, (HEADS + 2 * KV_HEADS) * DIM)
    query, key, value = merged.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
    return query, key.unflatten(-1, (-1, DIM)), value.unflatten(-1, (-1, DIM))


def reference(backend: TritonAttnBackend, layer: SimpleNamespace, sinks: Tensor | None) -> Tensor:
    """What SGLang's kernel gives, request by request."""
    query, key, value = block()
    pool, outs = backend.token_to_kv_pool, []
    for number, slots in enumerate(backend.contexts()):
        own = slice(number * ROWS, (number + 1) * ROWS)
        keys = torch.cat([pool.k_buffer[0][slots], key[own]])
        values = torch.cat([pool.v_buffer[0][slots], value[own]])
        row = len(slots) + torch.arange(ROWS)[:, None]
        column = torch.arange(len(keys))[None]
        mask = (
            column <= row if layer.attn_type.value == "decoder" else (column >= 0).expand(ROWS, -1)
        )
        if layer.sliding_window_size > -1:
            mask = mask & (row <= column + layer.sliding_window_size)
        heads = [
            x.unflatten(-1, (-1, DIM)) if x.dim() == 2 else x for x in (query[own], keys, values)
        ]
        heads = [x.transpose(0, 1)[None] for x in heads]
        out = masked_attention(*heads, mask[None], layer.scaling, sinks)
        outs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(compat, "installed", lambda: "0.5.17")


@pytest.mark.parametrize("kind", ["decoder", "encoder_only"])
@pytest.mark.parametrize("window", [-1, 4, 40])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_the_back_ends(kind, window, with_sinks):
    backend = TritonAttnBackend()
    assert triton_attention.install(backend, DEVICE)
    layer = layer_of(attn_type=kind, sliding_window_size=window)
    sinks = random(HEADS) if with_sinks else None
    expected = reference(backend, layer, sinks)
    query, key, value = block()
    batch = batch_of(backend)
    out = backend.forward_extend(query, key, value, layer, batch, sinks=sinks)
    assert backend.natively == 0
    assert error(out, expected) < 1e-5
    # The block's rows are in the pool as after the back end's own pass.
    assert torch.equal(backend.token_to_kv_pool.k_buffer[0][batch.out_cache_loc], key)
    assert torch.equal(backend.token_to_kv_pool.v_buffer[0][batch.out_cache_loc], value)


@pytest.mark.parametrize(
    ("changes", "layer", "options"),
    [
        ({}, {"logit_cap": 30.0}, {}),
        ({}, {"v_head_dim": 8}, {}),
        ({}, {"k_scale": 1.0}, {}),
        ({}, {"attn_type": "decoder_bidirectional"}, {}),
        ({}, {"attn_type": "encoder_only", "sliding_window_size": 2}, {}),
        ({"custom_mask": torch.ones(3)}, {}, {}),
        ({"max_extend_len": 3}, {}, {}),
        ({}, {}, {"save_kv_cache": False}),
        ({}, {}, {"score_mod": len}),
    ],
)
def test_what_is_more_than_plain_stays_the_back_ends(changes, layer, options):
    backend = TritonAttnBackend(**changes)
    assert triton_attention.install(backend, DEVICE)
    backend.forward_extend(*block(), layer_of(**layer), batch_of(backend), **options)
    assert backend.natively == 1


def test_prompts_stay_the_back_ends():
    backend = TritonAttnBackend()
    assert triton_attention.install(backend, DEVICE)
    backend.forward_extend(*block(), layer_of(), batch_of(backend, verifies=False))
    assert backend.natively == 1


def test_what_nobody_reads_is_not_listed_before_a_captured_pass():
    backend = TritonAttnBackend()
    assert triton_attention.install(backend, DEVICE)
    batch, prompt = batch_of(backend), batch_of(backend, verifies=False)
    fill = backend.init_forward_metadata_out_graph
    fill(batch, in_capture=True)
    fill(batch)
    assert backend.filled == 2, "nothing is captured yet"
    backend.forward_extend(*block(), layer_of(), batch)
    fill(batch)
    assert backend.filled == 2
    fill(prompt)
    fill(batch, in_capture=True)
    fill(batch, True)
    assert backend.filled == 5
    backend.forward_extend(*block(), layer_of(logit_cap=30.0), batch)
    fill(batch)
    assert backend.filled == 6, "one layer of the pass reads the lists"


@pytest.mark.parametrize("attribute", ["enable_deterministic", "dcp_size", "_translate_kv_loc"])
def test_back_ends_that_are_left_alone(attribute):
    backend = TritonAttnBackend()
    setattr(backend, attribute, 2)
    assert not triton_attention.install(backend, DEVICE)


@pytest.mark.parametrize("translates", [False, True])
def test_back_ends_that_translate_slots_are_left_alone(monkeypatch, translates):
    monkeypatch.setattr(compat, "installed", lambda: "0.5.20")
    backend = TritonAttnBackend()
    backend.kv_index_translator = SimpleNamespace(is_translating=translates)
    assert (triton_attention.install(backend, DEVICE) is None) is translates


def test_a_pass_that_names_its_output_stays_the_back_ends():
    backend = TritonAttnBackend()
    assert triton_attention.install(backend, DEVICE)
    batch = batch_of(backend)
    batch._attn_output = torch.zeros(1)
    backend.forward_extend(*block(), layer_of(), batch)
    assert backend.natively == 1


def test_a_batch_of_0_5_16_cannot_name_an_output(monkeypatch):
    monkeypatch.setattr(compat, "installed", lambda: "0.5.16")
    backend = TritonAttnBackend()
    assert triton_attention.install(backend, DEVICE)
    batch = batch_of(backend)
    del batch._attn_output
    backend.forward_extend(*block(), layer_of(), batch)
    assert backend.natively == 0


def test_pools_that_are_left_alone():
    backend = TritonAttnBackend()
    backend.token_to_kv_pool.dtype = torch.float8_e4m3fn
    assert not triton_attention.install(backend, DEVICE)
