"""Compile every kernel for an H100 or H200 (sm_90), which takes no GPU: a line of JSON for each.

    python tests/helpers/compile_kernels.py

The shapes are those of a Qwen3-8B drafter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 4096, 32, 8, 128, 12288, 5
# Of a DFlash 2 drafter.
TAPS, GROUP, RANK, CANDIDATES = 2, 16, 256, 16
BF16 = torch.bfloat16
EPS = 1e-6
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """What the compiler asks of a device."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compile:
    """Takes the place of a launch."""

    def __init__(self, kernel: JITFunction[Any], grid: Any) -> None:
        self.kernel, self.grid = kernel, grid

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        compiled = self.kernel.warmup(*args, grid=self.grid, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        record = {
            "kernel": f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.__name__}",
            "registers": int(found[1]),
            "stack_bytes": int(found[2]),
            "shared_bytes": compiled.metadata.shared,
        }
        print(json.dumps(record), flush=True)


def of(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def elementwise(rows: int) -> None:
    from dflash_plugin.kernels.add_rms_norm import Convolution, add_rms_norm
    from dflash_plugin.kernels.common import NormRope
    from dflash_plugin.kernels.gated_act import gated_act
    from dflash_plugin.kernels.grouped_convolution import grouped_convolution
    from dflash_plugin.kernels.inject_kv import KVPools, inject_kv
    from dflash_plugin.kernels.projected_convolution import projected_convolution
    from dflash_plugin.kernels.qk_norm_rope import qk_norm_rope

    add_rms_norm(of(rows, HIDDEN), of(rows, HIDDEN), of(HIDDEN), EPS)
    kernels = Convolution(of(rows, TAPS, HIDDEN // GROUP), of(TAPS, HIDDEN), 8)
    for rounds in (False, True):
        grouped_convolution(of(rows, HIDDEN), *kernels, rounds)
        add_rms_norm(
            of(rows, HIDDEN), of(rows, HIDDEN), of(HIDDEN), EPS,
            rounds=rounds, convolved_with=kernels,
        )  # fmt: skip
    projection = of(2 * TAPS * HIDDEN // GROUP, HIDDEN)
    for rounds in (False, True):
        projected_convolution(of(rows, HIDDEN), projection, of(TAPS, HIDDEN), 8, rounds)
    gated_act(of(rows, 2 * INTERMEDIATE))
    how, weight = NormRope(torch.ones(HEAD_DIM // 2), EPS), of(HEAD_DIM)
    qkv = of(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    qk_norm_rope(qkv, whole(rows), (weight, weight), how, HEADS, KV_HEADS)
    for dtype in (BF16, torch.float8_e4m3fn):
        pools = [[of(64, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(LAYERS)] for _ in "kv"]
        inject_kv(
            of(rows, LAYERS, 2, KV_HEADS, HEAD_DIM),
            whole(rows),
            whole(rows),
            KVPools.build(*pools, None if dtype == BF16 else [(0.5, 0.5)] * LAYERS),
            of(LAYERS, HEAD_DIM),
            how,
            committed=torch.ones(rows, dtype=torch.int32),
        )


def products(rows: int) -> None:

    from dflash_plugin.kernels.best_logits import best_logits
    from dflash_plugin.kernels.draft_head import draft_head
    from dflash_plugin.kernels.fp8_product import fp8_product
    from dflash_plugin.kernels.fp8_rows import quantize
    from dflash_plugin.kernels.quantize_rows import quantize_rows

    hidden, head = of(rows, HIDDEN), of(1024, HIDDEN)
    draft_head(hidden, head)
    draft_head(hidden, head, top_k=CANDIDATES)
    best_logits(of(rows, 1024), CANDIDATES)
    values, scales = quantize(head)
    draft_head(hidden, values, weight_scale=scales)
    rounded = quantize(hidden)
    draft_head(rounded.values, values, hidden_scale=rounded.scales, weight_scale=scales)
    quantize_rows(hidden)
    if rows <= 256:
        for columns, width in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
            fp8_product(quantize(of(rows, width)), quantize(of(columns, width)), BF16)
    quantize_rows(of(16, INTERMEDIATE))


def adaptive(batch: int, drafts: int) -> None:
    from dflash_plugin.adaptive.acceptance_model import AcceptanceModel
    from dflash_plugin.kernels.admit_drafts import admit_drafts
    from dflash_plugin.kernels.cut_blocks import cut_blocks
    from dflash_plugin.kernels.learn_acceptance import learn_acceptance
    from dflash_plugin.kernels.predict_acceptance import predict_acceptance

    acceptance = of(batch, drafts, dtype=torch.float32)
    counts = [of(size, dtype=torch.int32) for size in (batch, batch, batch, batch + 1, batch + 9)]
    admit_drafts(acceptance, whole(batch), *counts[:2], batch, *counts[2:])
    rows = batch * drafts
    row, slots = of(rows, dtype=torch.float32), whole(rows)
    offsets = of(drafts, dtype=torch.float32)
    for slope in (offsets[:1], offsets):
        for log_sum_exp in (row, None):
            predict_acceptance(
                row, log_sum_exp, slots, slots, slope, offsets, acceptance, acceptance
            )
    model = AcceptanceModel(drafts)
    for starts in (None, counts[3]):
        state = model.state, model.prior_precision, model.fade
        learn_acceptance(acceptance, counts[0], starts, *state)
    tokens, starts = whole(batch, drafts + 1), counts[-1]
    share = of(4 * len(starts), dtype=torch.int32)
    cut_blocks(tokens, tokens.flatten(), tokens.flatten(), 4 * batch, starts, share)


def selector(batch: int, drafts: int) -> None:
    from dflash_plugin.kernels.select_path import Limits, select_path
    from dflash_plugin.kernels.uniforms import Stream, uniforms

    logits = of(batch, drafts, CANDIDATES, dtype=torch.float32)
    gates = of(batch, drafts, RANK)
    noise = of(batch, dtype=torch.float32), of(batch, drafts, dtype=torch.float64)
    for dtype in (BF16, torch.float32):
        codebook = of(1024, RANK, dtype=dtype)
        arguments = (whole(*logits.shape), logits, gates, whole(batch), codebook, codebook)
        select_path(*arguments)
        select_path(*arguments, *noise)
        limits = Limits(
            whole(batch), of(batch, dtype=torch.float32), of(batch, dtype=torch.float32)
        )
        select_path(*arguments, *noise, limits)
        select_path(*arguments, *noise, limits._replace(factors=noise[1].float()))
    uniforms(whole(batch), whole(batch, drafts), Stream.DRAFT)


def step(batch: int, block: int) -> None:

    from dflash_plugin.kernels.accept import Sampled, accept
    from dflash_plugin.kernels.accept_block import accept_block
    from dflash_plugin.kernels.accept_greedy import accept_greedy
    from dflash_plugin.kernels.draft_attention import Blocks, PagedContext, draft_attention
    from dflash_plugin.kernels.draw_tokens import draw_tokens
    from dflash_plugin.kernels.limited_softmax import TokenLimits, limited_softmax

    drafts, request = whole(batch, block - 1), whole(batch)
    target = of(batch, block, 1024, dtype=torch.float32)
    for draft_probs in (None, target[:, :-1].contiguous()):
        accept(drafts, Sampled(target, draft_probs, request), request)
        rows = Sampled(target.flatten(0, 1), draft_probs, request, whole(batch, block))
        accept(drafts, rows, request)
    accept_block(drafts, rows, request)
    some = target[:, :-1, :16].contiguous()
    candidates = Sampled(target, some, request, None, whole(batch, block - 1, 16))
    for judge in (accept, accept_block):
        judge(drafts, candidates, request)
    accept_greedy(drafts, whole(batch * block), whole(batch, block))
    draw_tokens(target, of(batch, block, dtype=torch.float64))
    temperature, share = of(batch, block, dtype=torch.float32), of(batch, dtype=torch.float32)
    for dtype in (BF16, torch.float32):
        logits = of(batch, block, 1024, dtype=dtype)
        limited_softmax(logits, temperature)
        limited_softmax(logits, temperature, TokenLimits(whole(batch), share, share))
    query, key = of(batch, block, HEADS, HEAD_DIM), of(batch, block, KV_HEADS, HEAD_DIM)
    pool = of(64, KV_HEADS, HEAD_DIM)
    context = PagedContext(pool, pool, whole(batch, 64), request)
    for window in (None, 2048):
        draft_attention(query, key, key, context, HEAD_DIM**-0.5, sliding_window=window)
    # Requests enough that no context is cut, and widths that take most shared memory.
    for width in (HEAD_DIM, 256):
        pool = of(64, 2, width)
        for requests in (1, 64):
            query, key = of(requests, block, 8, width), of(requests, block, 2, width)
            context = PagedContext(pool, pool, whole(requests, 64), whole(requests))
            counts = [of(size, dtype=torch.int32) for size in (requests + 1, requests * block)]
            draft_attention(
                *(part.flatten(0, 1) for part in (query, key, key)), context, 0.1, causal=True,
                own_slots=whole(requests * block), blocks=Blocks(*counts, block),
            )  # fmt: skip
            draft_attention(
                query, key, key, context, 0.1, causal=True, own_slots=whole(requests, block),
            )  # fmt: skip


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is 1, with which nothing is compiled: unset it")
    driver.set_active(Driver())
    from dflash_plugin import kernels
    from dflash_plugin.kernels import common

    common.overlap = lambda device: {"launch_pdl": True}  # As on an H100.
    JITFunction.__getitem__ = lambda kernel, grid: Compile(kernel, grid)
    with kernels.forced(True):
        elementwise(16)
        for rows in (15, 60, 960):
            products(rows)
        step(4, 16)
        for drafts in (7, 15):
            selector(4, drafts)
        for batch in (1, 64, 1024):
            adaptive(batch, 15)


if __name__ == "__main__":
    main()
