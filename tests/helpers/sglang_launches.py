"""Variants that SGLang's captured passes launch, and ``launches_to_come`` did not; for Qwen3-8B.

    python -m tests.helpers.sglang_launches

Prints one line of JSON. It compiles nothing, and needs neither a GPU nor SGLang.
"""

from __future__ import annotations

import json
from enum import Enum
from types import SimpleNamespace

import torch
import triton
from torch import nn
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dflash_plugin import kernels
from dflash_plugin.drafter import fp8_linear
from dflash_plugin.kernels.fp8_rows import FP8, Fp8Rows
from dflash_plugin.serving.adaptive_setup import VerifyBudget
from dflash_plugin.serving.compile_beside import launches
from dflash_plugin.serving.draft_tokens import best_of_shard
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.serving.fp8_weights import Fp8Method
from dflash_plugin.sglang import block_attention
from dflash_plugin.sglang.adaptive import AdaptiveVerifier
from dflash_plugin.sglang.launches_to_come import Batch, launch_drafter, launch_verify_passes
from dflash_plugin.sglang.verify_graphs import VerifyGraphs
from tests.helpers.compile_kernels import (
    BF16,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    Driver,
    of,
    whole,
)
from tests.helpers.start_compilation import warmups

BLOCK, SHORT, VOCABULARY, SIZE, CPU = 16, 8, 151936, 128, torch.device("cpu")
REQUESTS = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]
CUT_ROWS = [16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048]
# Batches of no more requests are never cut.
BYPASS = 8
# Of a head that is multiplied by ``draft_head``.
HEAD_ROWS = 512


class Linear(nn.Module):
    """A linear of the drafter on SGLang's layers, in FP8."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=FP8), requires_grad=False)
        self.register_buffer("fp8_scales", torch.empty(rows))
        self.quant_method = Fp8Method()


class Kind(Enum):
    """SGLang's ``AttentionType``."""

    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class RadixAttention(nn.Module):
    """What is read of SGLang's."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num, self.qk_head_dim = HEADS, KV_HEADS, HEAD_DIM
        self.sliding_window_size, self.attn_type, self.layer_id = -1, kind, 0
        self.scaling = HEAD_DIM**-0.5


class Parts(nn.Module):
    """The drafter's linears."""

    own_head = None

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.norm = nn.LayerNorm(HIDDEN, dtype=BF16)
        self.qkv_proj = Linear(width + 2 * KV_HEADS * HEAD_DIM, HIDDEN)
        self.output_proj = Linear(HIDDEN, width)
        self.gate_up_proj = Linear(2 * INTERMEDIATE, HIDDEN)
        self.down_proj = Linear(HIDDEN, INTERMEDIATE)
        self.fc = Linear(HIDDEN, 5 * HIDDEN)


def make_attention(**more: object) -> block_attention.BlockAttention:
    pool = SimpleNamespace(
        dtype=BF16,
        get_key_buffer=lambda layer: of(64, KV_HEADS, HEAD_DIM),
        get_value_buffer=lambda layer: of(64, KV_HEADS, HEAD_DIM),
    )
    table = torch.zeros(SIZE + 1, 2052, dtype=torch.int32)
    return block_attention.BlockAttention(pool, table, **more)


def passes(
    model: SimpleNamespace,
    verifier: AdaptiveVerifier,
    drafter: block_attention.BlockAttention,
    target: block_attention.BlockAttention,
    cut: block_attention.BlockAttention,
) -> None:
    """Launch as SGLang's runners do when they capture."""
    verifier.attention = None
    free, causal = RadixAttention(Kind.ENCODER_ONLY), RadixAttention(Kind.DECODER)
    rows = SIZE * BLOCK
    lengths, requests, slots = whole(SIZE), whole(SIZE), whole(rows)
    qkv = of(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

    def attend(attention, layer, count, batch):
        query, key, value = qkv[:count].split([width, kv_width, kv_width], dim=-1)
        buffers = Batch(lengths[:batch], requests[:batch], slots[:count])
        heads = (part.unflatten(-1, (-1, HEAD_DIM)) for part in (key, value))
        block_attention.attend(attention, query, *heads, layer, buffers, None)

    for batch in REQUESTS:
        for block in (BLOCK, SHORT):
            attend(drafter, free, batch * block, batch)
            for one in model.linears:
                weight = Fp8Rows(one.weight, one.fp8_scales)
                fp8_linear.linear(of(batch * block, weight.values.shape[1]), weight)
            drafts = block - 1
            if batch * drafts <= HEAD_ROWS:
                model.shard_choice(of(batch * drafts, HIDDEN))
            if batch > BYPASS:
                row = torch.zeros(batch * drafts)
                verifier.predictor.predict(row, row, drafts)
        if target.takes(batch, batch * BLOCK):
            attend(target, causal, batch * BLOCK, batch)
        verifier.num_rows = batch + 1
        verifier.compact(whole(batch * BLOCK), whole(batch * BLOCK), whole(batch * BLOCK))
    for count in CUT_ROWS:
        fp8_linear.linear(of(count, HIDDEN), model.context_weight)
        if cut.takes(0, count):
            attend(cut, causal, count, min(count, SIZE))


def main() -> None:
    driver.set_active(Driver())
    JITFunction.__getitem__ = warmups
    fp8_linear.library_product = lambda x, weight: of(len(x.values), len(weight.values))
    head, parts = Linear(VOCABULARY, HIDDEN), Parts()
    context = Linear(2 * LAYERS * KV_HEADS * HEAD_DIM, HIDDEN)
    model = SimpleNamespace(
        drafter=parts,
        linears=[one for one in parts.children() if isinstance(one, Linear)],
        spec=SimpleNamespace(config=SimpleNamespace(selector=None)),
        context_weight=Fp8Rows(context.weight, context.fp8_scales),
        attentions=[RadixAttention(Kind.ENCODER_ONLY)] * LAYERS,
        # As of several ranks, where a whole pass is not launched.
        gather=lambda part: part,
        shard_choice=lambda hidden: best_of_shard(head, hidden, VOCABULARY, type(None)),
    )
    record, budget = {}, VerifyBudget(Options(), BLOCK - 1, SIZE, CPU)
    for name, most in (("flash_attention", block_attention.FEW_REQUESTS), ("triton", None)):
        drafter, target = make_attention(), make_attention(max_requests=most)
        few = None if most is None else block_attention.FEW_ROWS
        cut = make_attention(max_rows=few, blocks=VerifyGraphs(BLOCK, SIZE, CPU).blocks)
        verifier = AdaptiveVerifier(budget, BLOCK, SIZE, CPU)
        verifier.attention = target
        layers = nn.ModuleList([RadixAttention(Kind.DECODER)] * 2)
        with kernels.forced(True):
            with launches(triton.knobs) as ahead:
                launch_verify_passes(target, layers, verifier, BLOCK, SIZE)
                launch_drafter(model, None, drafter, [BLOCK, SHORT], SIZE)
            with launches(triton.knobs) as captured:
                passes(model, verifier, drafter, target, cut)
        missing = [one for one in captured if one not in ahead]
        record[name] = {
            "captured": len(captured),
            "ahead": len(ahead),
            "missing": [f"{one.module}.{one.name}" for one in missing],
            "blocks_are_back": target.blocks is None,
        }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
