"""Attention of blocks under SGLang's back ends, with made-up ones: it needs no SGLang."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.draft_attention import Blocks
from dflash_plugin.sglang import block_attention, compat
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


class Backend:
    """A back end in a verify pass; its own attention only says that it was asked."""

    def __init__(self) -> None:
        self.natively, self.filled = 0, 0

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        self.filled += 1

    def forward_extend(self, *_: Any, **__: Any) -> Tensor:
        self.natively += 1
        return torch.zeros(())


class TritonAttnBackend(Backend):
    _translate_kv_loc: Any = None


class FlashAttentionBackend(Backend):
    fa_impl_ver, attn_cp_size, speculative_num_draft_tokens = 3, 1, ROWS
    use_mla = has_local_attention = is_prefill_aware_swa = is_encoder_decoder = False


class FlashInferAttnBackend(Backend):
    enable_mis = is_dllm_model = False


BACKENDS = [TritonAttnBackend, FlashAttentionBackend, FlashInferAttnBackend]


class Runner:
    """SGLang's runner of one model, with its pools."""

    def __init__(self, backend: type[Backend] = TritonAttnBackend, **arguments: Any) -> None:
        self.attn_backend: Any = backend()
        self.token_to_kv_pool = MHATokenToKVPool()
        self.slots = torch.randperm(255, generator=torch.Generator().manual_seed(0), device="cpu")
        self.slots = (self.slots + 1).to(DEVICE)
        table = integers(0, 256, 6, 100).int()
        for row, slots in zip(REQUESTS, self.contexts(), strict=True):
            table[row, : len(slots)] = slots
        self.req_to_token_pool = SimpleNamespace(req_to_token=table)
        self.is_draft_worker = False
        values = {"enable_deterministic_inference": False, "dcp_size": 1, **arguments}
        self.server_args = SimpleNamespace(**values)

    def contexts(self) -> list[Tensor]:
        """The slots of every request's context."""
        ends = torch.tensor(LENGTHS, device="cpu").cumsum(0).tolist()
        return [self.slots[end - length : end] for end, length in zip(ends, LENGTHS, strict=True)]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.attn_backend.forward_extend(*args, **kwargs)


def installed(**arguments: Any) -> tuple[Runner, Any, block_attention.BlockAttention]:
    runner = Runner(**arguments)
    attention = block_attention.install(runner, DEVICE)
    assert attention is not None
    return runner, runner.attn_backend, attention


def layer_of(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "tp_q_head_num": HEADS, "tp_k_head_num": KV_HEADS, "qk_head_dim": DIM, "v_head_dim": DIM,
        "layer_id": 0, "scaling": 0.25, "sliding_window_size": -1, "attn_type": "decoder",
        "logit_cap": 0.0, "k_scale": None, "is_cross_attention": False, "xai_temperature_len": -1,
    }  # fmt: skip
    values.update(changes)
    return SimpleNamespace(**{**values, "attn_type": AttentionType(values["attn_type"])})


def batch_of(runner: Runner, verifies: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_target_verify=lambda: verifies),
        out_cache_loc=runner.slots[200 : 200 + TOKENS],
        batch_size=len(LENGTHS),
        seq_lens=torch.tensor(LENGTHS),
        req_pool_indices=torch.tensor(REQUESTS),
        spec_info=SimpleNamespace(custom_mask=None),
        _attn_output=None,
    )


def block() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one merged projection."""
    merged = random(TOKENS, (HEADS + 2 * KV_HEADS) * DIM)
    query, key, value = merged.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
    return query, key.unflatten(-1, (-1, DIM)), value.unflatten(-1, (-1, DIM))


def reference(runner: Runner, layer: SimpleNamespace, sinks: Tensor | None) -> Tensor:
    """What SGLang's kernel gives, request by request."""
    query, key, value = block()
    pool, outs = runner.token_to_kv_pool, []
    for number, slots in enumerate(runner.contexts()):
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
    runner, backend, _ = installed()
    layer = layer_of(attn_type=kind, sliding_window_size=window)
    sinks = random(HEADS) if with_sinks else None
    expected = reference(runner, layer, sinks)
    query, key, value = block()
    batch = batch_of(runner)
    out = runner.forward(query, key, value, layer, batch, sinks=sinks)
    assert backend.natively == 0
    assert error(out, expected) < 1e-5
    # The block's rows are in the pool as after the back end's own pass.
    assert torch.equal(runner.token_to_kv_pool.k_buffer[0][batch.out_cache_loc], key)
    assert torch.equal(runner.token_to_kv_pool.v_buffer[0][batch.out_cache_loc], value)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_every_back_end_attends_to_the_same(monkeypatch, name, page_size):
    """The request table names slots, whatever the pages are."""
    monkeypatch.setattr(block_attention, "FEW_REQUESTS", len(LENGTHS))
    runner, backend, attention = installed(backend=name)
    backend.page_size = page_size
    expected = reference(runner, layer_of(), None)
    assert error(runner.forward(*block(), layer_of(), batch_of(runner)), expected) < 1e-5
    assert backend.natively == 0
    assert attention.only_ours


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ({"logit_cap": 30.0}, {}),
        ({"v_head_dim": 8}, {}),
        ({"k_scale": 1.0}, {}),
        ({"attn_type": "decoder_bidirectional"}, {}),
        ({"attn_type": "encoder_only", "sliding_window_size": 2}, {}),
        ({}, {"save_kv_cache": False}),
        ({}, {"score_mod": len}),
        ({}, {"return_lse": True}),
    ],
)
def test_what_is_more_than_plain_stays_the_back_ends(layer, options):
    runner, backend, attention = installed()
    runner.forward(*block(), layer_of(**layer), batch_of(runner), **options)
    assert backend.natively == 1
    assert not attention.only_ours


def test_masks_stay_the_back_ends():
    runner, backend, _ = installed()
    batch = batch_of(runner)
    batch.spec_info.custom_mask = torch.ones(3)
    runner.forward(*block(), layer_of(), batch)
    assert backend.natively == 1


def test_prompts_stay_the_back_ends():
    runner, backend, _ = installed()
    runner.forward(*block(), layer_of(), batch_of(runner, verifies=False))
    assert backend.natively == 1


def test_options_that_are_off_change_nothing():
    runner, backend, _ = installed()
    runner.forward(*block(), layer_of(), batch_of(runner), return_lse=False, score_mod=None)
    assert backend.natively == 0


def test_what_nobody_reads_is_not_filled_before_a_captured_pass():
    runner, backend, _ = installed()
    batch, prompt = batch_of(runner), batch_of(runner, verifies=False)
    fill = backend.init_forward_metadata_out_graph
    fill(batch, in_capture=True)
    fill(batch)
    assert backend.filled == 2, "nothing is captured yet"
    runner.forward(*block(), layer_of(), batch)
    fill(batch)
    assert backend.filled == 2
    fill(prompt)
    fill(batch, in_capture=True)
    fill(batch, True)
    assert backend.filled == 5
    runner.forward(*block(), layer_of(logit_cap=30.0), batch)
    fill(batch)
    assert backend.filled == 6, "one layer of the pass reads the metadata"


@pytest.mark.parametrize("drafts", [False, True])
def test_large_batches_of_the_target_stay_flash_attentions(monkeypatch, drafts):
    monkeypatch.setattr(block_attention, "FEW_REQUESTS", 2)
    runner = Runner(FlashAttentionBackend)
    runner.is_draft_worker = drafts
    backend, batch = runner.attn_backend, batch_of(runner)
    attention = block_attention.install(runner, DEVICE)
    runner.forward(*block(), layer_of(), batch)
    assert backend.natively == (0 if drafts else 1)
    small = batch_of(runner)
    small.batch_size, small.seq_lens = 2, small.seq_lens[:2]
    small.req_pool_indices = small.req_pool_indices[:2]
    runner.forward(*(part[: 2 * ROWS] for part in block()), layer_of(), small)
    assert backend.natively == (0 if drafts else 1)
    assert attention.only_ours is drafts
    # Each kind of pass has the metadata that its attention reads.
    for one, read in ((batch, not drafts), (small, False)):
        before = backend.filled
        backend.init_forward_metadata_out_graph(one)
        assert (backend.filled > before) is read


def test_requests_with_different_numbers_of_rows(monkeypatch):
    monkeypatch.setattr(block_attention, "FEW_REQUESTS", len(LENGTHS))
    runner, backend, attention = installed(backend=FlashAttentionBackend)
    whole, counts = reference(runner, layer_of(), None), (3, 1, 2)
    starts = torch.tensor([0, 3, 4, 6, 6]).int()
    requests = torch.tensor([0, 0, 0, 1, 2, 2, 9, 9]).int()
    attention.blocks = Blocks(starts, requests, ROWS)
    rows = [ROWS * n + row for n, count in enumerate(counts) for row in range(count)]
    batch = batch_of(runner)
    out = runner.forward(*(part[rows] for part in block()), layer_of(), batch)
    assert backend.natively == 0
    assert error(out, whole[rows]) < 1e-5


@pytest.mark.parametrize("few", [6, 5])
def test_cut_passes_of_many_rows_stay_flash_attentions(monkeypatch, few):
    """Under a back end of their own, of which the host prepares what FlashAttention reads."""
    monkeypatch.setattr(block_attention, "FEW_ROWS", few)
    runner, counts = Runner(FlashAttentionBackend), (3, 1, 2)
    whole, backend = reference(runner, layer_of(), None), runner.attn_backend
    starts = torch.tensor([0, 3, 4, 6, 6]).int()
    requests = torch.tensor([0, 0, 0, 1, 2, 2, 9, 9]).int()
    attention = block_attention.install_for_cut_passes(
        backend, runner, DEVICE, Blocks(starts, requests, ROWS)
    )
    assert attention is not None
    rows = [ROWS * n + row for n, count in enumerate(counts) for row in range(count)]
    batch = batch_of(runner)
    batch.spec_info.ragged_verify_layout = SimpleNamespace(graph_num_tokens=len(rows))
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    out = runner.forward(*(part[rows] for part in block()), layer_of(), batch)
    backend.init_forward_metadata_out_graph(batch)
    ours = len(rows) <= few
    assert (backend.natively, backend.filled) == ((0, 1) if ours else (1, 2))
    assert attention.replaces(len(counts), len(rows)) is ours
    if ours:
        assert error(out, whole[rows]) < 1e-5


def test_cut_passes_of_other_back_ends_stay_theirs():
    runner = Runner(TritonAttnBackend)
    blocks = Blocks(torch.zeros(2).int(), torch.zeros(1).int(), ROWS)
    made = block_attention.install_for_cut_passes(runner.attn_backend, runner, DEVICE, blocks)
    assert made is None


@pytest.mark.parametrize(
    ("backend", "refused"), list(zip(BACKENDS, [False, True, False], strict=True))
)
def test_a_back_end_is_not_given_rows_that_it_lays_out_wrongly(backend, refused):
    """FlashAttention goes by its own number of rows, and would read beyond the pass."""
    runner, made, attention = installed(backend=backend)
    short = [part[: TOKENS - len(LENGTHS)] for part in block()]
    layer = layer_of(logit_cap=30.0)
    if refused:
        with pytest.raises(DFlashError, match="takes blocks of one length only"):
            runner.forward(*short, layer, batch_of(runner))
    else:
        runner.forward(*short, layer, batch_of(runner))
        assert made.natively == 1
    attention.ragged = True
    with pytest.raises(DFlashError, match="turn adaptive_verification off"):
        runner.forward(*block(), layer, batch_of(runner))


@pytest.mark.parametrize(
    ("backend", "attribute", "value"),
    [
        (TritonAttnBackend, "_translate_kv_loc", len),
        (FlashAttentionBackend, "fa_impl_ver", 4),
        (FlashAttentionBackend, "use_mla", True),
        (FlashAttentionBackend, "has_local_attention", True),
        (FlashAttentionBackend, "is_prefill_aware_swa", True),
        (FlashAttentionBackend, "is_encoder_decoder", True),
        (FlashAttentionBackend, "attn_cp_size", 2),
        (FlashInferAttnBackend, "enable_mis", True),
        (FlashInferAttnBackend, "is_dllm_model", True),
        (Backend, "page_size", 1),
    ],
)
def test_back_ends_that_are_left_alone(backend, attribute, value):
    runner = Runner(backend)
    setattr(runner.attn_backend, attribute, value)
    assert block_attention.install(runner, DEVICE) is None


@pytest.mark.parametrize(
    ("name", "value"), [("enable_deterministic_inference", True), ("dcp_size", 2)]
)
def test_servers_that_are_left_alone(name, value):
    assert block_attention.install(Runner(**{name: value}), DEVICE) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("translates", [False, True])
def test_back_ends_that_translate_slots_are_left_alone(monkeypatch, backend, translates):
    monkeypatch.setattr(compat, "installed", lambda: "0.5.20")
    monkeypatch.setattr(block_attention, "argument", lambda arguments, name: vars(arguments)[name])
    runner = Runner(backend)
    runner.attn_backend.kv_index_translator = SimpleNamespace(is_translating=translates)
    assert (block_attention.install(runner, DEVICE) is None) is translates


def test_a_pass_that_names_its_output_stays_the_back_ends():
    runner, backend, _ = installed()
    batch = batch_of(runner)
    batch._attn_output = torch.zeros(1)
    runner.forward(*block(), layer_of(), batch)
    assert backend.natively == 1


def test_pools_that_are_left_alone():
    runner = Runner()
    runner.token_to_kv_pool.dtype = torch.float8_e4m3fn
    assert not block_attention.install(runner, DEVICE)
