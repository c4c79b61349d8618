"""Each kernel, its naive twin, what an engine does instead, and a copy of as many bytes, on CUDA.

    python benchmarks/kernels.py --output FILE.json
    python benchmarks/kernels.py --ops draft_head,inject_kv

The shapes are those of a Qwen3-8B drafter in bfloat16; sizes are rows, requests or positions.
Figures are medians in microseconds with a cold L2 cache, replayed from CUDA graphs, except those of
twins and "engine_eager".
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 5, 4096, 32, 8, 128, 12288
VOCABULARY, BLOCK = 151_936, 16
DEVICE = "cuda"
# Of a DFlash 2 drafter.
TAPS, GROUP, RANK, CANDIDATES, DRAFTS = 2, 16, 256, 16, 15
EPS = 1e-6
# Rows of a step with most requests.
VERIFIED = 1024
Run = Callable[[], object]


class Case(NamedTuple):
    """One op at one size.

    Attributes:
        kernel, twin: ours.
        moved: bytes that have to be read and written.
        engine: the torch calls that an engine makes instead.
    """

    kernel: Run
    twin: Run
    moved: int
    engine: Run | None = None


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def add_rms_norm(rows: int) -> Case:
    from dflash_plugin.kernels.add_rms_norm import add_rms_norm, add_rms_norm_naive

    arguments = (random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN), EPS)
    moved = 4 * rows * HIDDEN * 2
    return Case(lambda: add_rms_norm(*arguments), lambda: add_rms_norm_naive(*arguments), moved)


def convolution(rows: int) -> tuple[Tensor, Tensor, int]:
    """Kernels of one side, as both sides' projection gives them, and the rows of a block."""
    return random(rows, 2, TAPS, HIDDEN // GROUP)[:, 0], random(TAPS, HIDDEN), BLOCK


def grouped_convolution(rows: int) -> Case:
    from dflash_plugin.kernels.grouped_convolution import (
        grouped_convolution,
        grouped_convolution_naive,
    )

    arguments = (random(rows, HIDDEN), *convolution(rows))
    return Case(
        lambda: grouped_convolution(*arguments),
        lambda: grouped_convolution_naive(*arguments),
        rows * (2 * HIDDEN + TAPS * HIDDEN // GROUP) * 2,
    )


def convolve_add_rms_norm(rows: int) -> Case:
    """``add_rms_norm`` with a convolution of what is added; "engine" is the two one by one."""
    from dflash_plugin.kernels.add_rms_norm import Convolution, add_rms_norm, add_rms_norm_naive
    from dflash_plugin.kernels.grouped_convolution import grouped_convolution

    x, kernels = random(rows, HIDDEN), Convolution(*convolution(rows))
    arguments = (random(rows, HIDDEN), random(HIDDEN), EPS)
    return Case(
        lambda: add_rms_norm(x, *arguments, convolved_with=kernels),
        lambda: add_rms_norm_naive(x, *arguments, convolved_with=kernels),
        rows * (4 * HIDDEN + TAPS * HIDDEN // GROUP) * 2,
        lambda: add_rms_norm(grouped_convolution(x, *kernels), *arguments),
    )


def kernel_projection(rows: int) -> Case:
    """Both convolutions' kernels of a sublayer, which are the library's product."""
    x, weight = random(rows, HIDDEN), random(2 * TAPS * HIDDEN // GROUP, HIDDEN)
    return Case(lambda: F.linear(x, weight), lambda: F.linear(x, weight), weight.nbytes)


def projected_convolution(rows: int) -> Case:
    """The convolution of a sublayer's input with its kernels' product; "engine" is one by one."""
    from dflash_plugin.kernels.grouped_convolution import grouped_convolution
    from dflash_plugin.kernels.projected_convolution import (
        projected_convolution,
        projected_convolution_naive,
    )

    x, weight = random(rows, HIDDEN), random(2 * TAPS * HIDDEN // GROUP, HIDDEN)
    arguments = (x, weight, random(TAPS, HIDDEN), BLOCK)

    def one_by_one() -> object:
        kernels = F.linear(x, weight).unflatten(-1, (2, TAPS, HIDDEN // GROUP))
        return grouped_convolution(x, kernels[:, 0], *arguments[2:])

    return Case(
        lambda: projected_convolution(*arguments),
        lambda: projected_convolution_naive(*arguments),
        weight.nbytes,
        one_by_one,
    )


def select_path(batch: int) -> Case:
    """Every second request draws."""
    return selector(batch, sampled=True)


def select_path_greedy(batch: int) -> Case:
    return selector(batch, sampled=False)


def selector(batch: int, sampled: bool) -> Case:
    """The bytes are the codebooks' rows, of which none is read twice."""
    from dflash_plugin.kernels.select_path import select_path, select_path_naive

    shape = (batch, DRAFTS, CANDIDATES)
    candidates = torch.randint(VOCABULARY, shape, device=DEVICE)
    anchors = torch.randint(VOCABULARY, (batch,), device=DEVICE)
    logits = torch.randn(shape, device=DEVICE)
    gates, codebooks = random(batch, DRAFTS, RANK), [random(VOCABULARY, RANK) for _ in range(2)]
    noise: tuple[Tensor, ...] = ()
    if sampled:
        temperature = torch.arange(batch, device=DEVICE) % 2 * 0.8
        noise = (temperature, torch.rand(batch, DRAFTS, dtype=torch.float64, device=DEVICE))
    arguments = (candidates, logits, gates, anchors, *codebooks, *noise)
    return Case(
        lambda: select_path(*arguments),
        lambda: select_path_naive(*arguments),
        2 * candidates.numel() * RANK * 2,
    )


def uniforms(batch: int) -> Case:
    from dflash_plugin.kernels.uniforms import uniforms, uniforms_naive

    seed = torch.randint(1 << 62, (batch,), device=DEVICE)
    position = torch.randint(1 << 20, (batch, DRAFTS), device=DEVICE)
    return Case(
        lambda: uniforms(seed, position, 0),
        lambda: uniforms_naive(seed, position, 0),
        2 * position.nbytes,
    )


def gated_act(rows: int) -> Case:
    from dflash_plugin.kernels.gated_act import gated_act, gated_act_naive

    gate_up = random(rows, 2 * INTERMEDIATE)
    moved = 3 * rows * INTERMEDIATE * 2
    return Case(lambda: gated_act(gate_up), lambda: gated_act_naive(gate_up), moved)


def rotary(rows: int) -> tuple[Tensor, Tensor]:
    """Positions and inverse frequencies."""
    exponents = torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM
    return torch.arange(rows, device=DEVICE), 1_000_000.0**-exponents


def qk_norm_rope(rows: int) -> Case:
    from dflash_plugin.kernels.common import NormRope
    from dflash_plugin.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_naive

    qkv = random(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    positions, inverse = rotary(rows)
    weights = (random(HEAD_DIM), random(HEAD_DIM))
    arguments = (qkv, positions, weights, NormRope(inverse, EPS), HEADS, KV_HEADS)
    moved = 2 * rows * (HEADS + KV_HEADS) * HEAD_DIM * 2
    return Case(lambda: qk_norm_rope(*arguments), lambda: qk_norm_rope_naive(*arguments), moved)


def inject_kv(rows: int) -> Case:
    from dflash_plugin.kernels.common import NormRope
    from dflash_plugin.kernels.inject_kv import KVPools, inject_kv, inject_kv_naive

    kv = random(rows, LAYERS, 2, KV_HEADS, HEAD_DIM)
    positions, inverse = rotary(rows)
    slots = torch.randperm(2 * rows, device=DEVICE)[:rows]
    keys, values = ([random(2 * rows, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)] for _ in "kv")
    pools = KVPools.build(keys, values)
    weights = random(LAYERS, HEAD_DIM)
    arguments = (kv, positions, slots, pools, weights, NormRope(inverse, EPS))
    return Case(
        lambda: inject_kv(*arguments),
        lambda: inject_kv_naive(*arguments),
        2 * kv.nbytes,
        sglang_injection(kv, positions, slots, weights, inverse),
    )


def sglang_injection(
    kv: Tensor, positions: Tensor, slots: Tensor, weights: Tensor, inverse: Tensor
) -> Run | None:
    """What SGLang launches for the same: a norm and rotation, and a write for every layer."""
    try:
        from sglang.kernels.ops.speculative.fused_kv_materialize import _fused_norm_rope_stacked
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    except ImportError:
        return None
    rows = kv.shape[0]
    dtype = torch.bfloat16
    shape = (KV_HEADS, HEAD_DIM, LAYERS)
    pool = MHATokenToKVPool(2 * rows, 1, dtype, *shape, DEVICE, enable_memory_saver=False)
    angles = positions[:, None] * inverse
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    eps = torch.full((LAYERS,), EPS, device=DEVICE)
    keys, values = torch.empty(2, LAYERS, rows, KV_HEADS, HEAD_DIM, dtype=dtype, device=DEVICE)
    projected = kv.view(rows, LAYERS, -1)
    committed = torch.full((rows // BLOCK,), BLOCK, dtype=torch.int32, device=DEVICE)

    def run() -> None:
        _fused_norm_rope_stacked(
            projected, weights, eps, table, positions, KV_HEADS, HEAD_DIM, HEAD_DIM, keys, values
        )
        for layer in range(LAYERS):
            # A step's rows are written up to what was accepted, a prompt's are all written.
            if rows <= VERIFIED:
                pool.set_kv_buffer_prefix_valid(
                    None, slots.view(-1, BLOCK), committed, keys[layer], values[layer],
                    layer_id_override=layer,
                )  # fmt: skip
            else:
                pool.set_kv_buffer(None, slots, keys[layer], values[layer], layer_id_override=layer)

    return run


def draft_head(rows: int) -> Case:
    """The bytes are the head's, which every way to do it reads."""
    from dflash_plugin.kernels.draft_head import draft_head, draft_head_naive

    hidden, weight = random(rows, HIDDEN), random(VOCABULARY, HIDDEN)
    return Case(
        lambda: draft_head(hidden, weight),
        lambda: draft_head_naive(hidden, weight),
        weight.nbytes,
        lambda: F.linear(hidden, weight).argmax(dim=-1),
    )


def draft_head_candidates(rows: int) -> Case:
    """A selector's candidates; "engine" is a product and torch's."""
    from dflash_plugin.kernels.draft_head import draft_head, draft_head_naive

    hidden, weight = random(rows, HIDDEN), random(VOCABULARY, HIDDEN)
    return Case(
        lambda: draft_head(hidden, weight, top_k=CANDIDATES),
        lambda: draft_head_naive(hidden, weight, top_k=CANDIDATES),
        weight.nbytes,
        lambda: F.linear(hidden, weight).topk(CANDIDATES),
    )


def best_logits(rows: int) -> Case:
    """A selector's candidates of logits; "engine" is torch's."""
    from dflash_plugin.kernels.best_logits import best_logits, best_logits_naive

    logits = random(rows, VOCABULARY)
    return Case(
        lambda: best_logits(logits, CANDIDATES),
        lambda: best_logits_naive(logits, CANDIDATES),
        logits.nbytes,
        lambda: logits.topk(CANDIDATES),
    )


def draft_head_fp8(rows: int) -> Case:
    """With hidden states that are rounded first, as engines call it."""
    from dflash_plugin.kernels.draft_head import draft_head, draft_head_naive
    from dflash_plugin.kernels.fp8_rows import quantize
    from dflash_plugin.kernels.quantize_rows import quantize_rows

    hidden, weight = random(rows, HIDDEN), random(VOCABULARY, HIDDEN)
    values, scales = quantize(weight)

    def through(head: Callable[..., object]) -> object:
        rounded = quantize_rows(hidden)
        return head(rounded.values, values, hidden_scale=rounded.scales, weight_scale=scales)

    return Case(
        lambda: through(draft_head),
        lambda: through(draft_head_naive),
        values.nbytes,
        lambda: F.linear(hidden, weight).argmax(dim=-1),
    )


def fp8_linear(rows: int) -> Case:
    """The gate and up projection, the largest, by the library's product; "engine" is bfloat16's."""
    from dflash_plugin.drafter.fp8_linear import linear, linear_naive
    from dflash_plugin.kernels.fp8_rows import quantize

    x, weight = random(rows, HIDDEN), random(2 * INTERMEDIATE, HIDDEN)
    rounded = quantize(weight)
    return Case(
        lambda: linear(x, rounded),
        lambda: linear_naive(x, *rounded),
        rounded.values.nbytes,
        lambda: F.linear(x, weight),
    )


def fp8_product(rows: int) -> Case:
    """The gate and up projection; "engine" is the library's product of the same FP8 rows."""
    return few_rows(rows, 2 * INTERMEDIATE, HIDDEN)


def fp8_product_down(rows: int) -> Case:
    """The down projection, which is wide and has few rows."""
    return few_rows(rows, HIDDEN, INTERMEDIATE)


def few_rows(rows: int, columns: int, width: int) -> Case:
    from dflash_plugin.drafter.fp8_linear import library_product
    from dflash_plugin.kernels.fp8_product import fp8_product, fp8_product_naive
    from dflash_plugin.kernels.fp8_rows import quantize

    x, weight = quantize(random(rows, width)), quantize(random(columns, width))
    return Case(
        lambda: fp8_product(x, weight, torch.bfloat16),
        lambda: fp8_product_naive(x, weight, torch.bfloat16),
        weight.values.nbytes,
        lambda: library_product(x, weight),
    )


def quantize_rows(rows: int) -> Case:
    from dflash_plugin.kernels.quantize_rows import quantize_rows, quantize_rows_naive

    x = random(rows, INTERMEDIATE)
    moved = x.nbytes * 3 // 2
    return Case(lambda: quantize_rows(x), lambda: quantize_rows_naive(x), moved)


def sampled_blocks(batch: int, candidates: int | None = None) -> tuple[Any, ...]:
    """Arguments of ``accept`` and ``accept_block`` for drawn blocks, of a drafter near the target.

    Args:
        batch: requests.
        candidates: of a selector; None for distributions over the vocabulary.
    """
    from dflash_plugin.kernels.accept import Sampled

    logits = 3 * torch.randn(batch, DRAFTS + 1, VOCABULARY, device=DEVICE)
    target = logits.softmax(dim=-1)
    logits += torch.randn_like(logits)
    likeliest = None
    if candidates is None:
        draft_probs = logits[:, :-1].softmax(dim=-1)
        drafts = draft_probs.argmax(dim=-1)
    else:
        best = logits[:, :-1].topk(candidates, dim=-1)
        draft_probs, likeliest = best.values.softmax(dim=-1), best.indices
        drafts = likeliest[..., 0].contiguous()
    seeds = torch.arange(batch, device=DEVICE)
    return drafts, Sampled(target, draft_probs, seeds, None, likeliest), seeds


def accept(batch: int) -> Case:
    """The bytes are the probabilities of one row, read twice where the next token is drawn."""
    from dflash_plugin.kernels.accept import accept, accept_naive

    arguments = sampled_blocks(batch)
    return Case(
        lambda: accept(*arguments), lambda: accept_naive(*arguments), 4 * batch * VOCABULARY * 4
    )


def accept_block(batch: int) -> Case:
    """The same blocks, read whole once and twice where the next token is drawn.

    "Engine" is draft by draft.
    """
    from dflash_plugin.kernels.accept import accept
    from dflash_plugin.kernels.accept_block import accept_block, accept_block_naive

    arguments = sampled_blocks(batch)
    return Case(
        lambda: accept_block(*arguments),
        lambda: accept_block_naive(*arguments),
        (2 * DRAFTS + 4) * batch * VOCABULARY * 4,
        lambda: accept(*arguments),
    )


def accept_block_candidates(batch: int) -> Case:
    """Blocks of a selector, of which a row of the target is read whole; "engine" as before."""
    from dflash_plugin.kernels.accept import accept
    from dflash_plugin.kernels.accept_block import accept_block, accept_block_naive

    arguments = sampled_blocks(batch, CANDIDATES)
    return Case(
        lambda: accept_block(*arguments),
        lambda: accept_block_naive(*arguments),
        2 * batch * VOCABULARY * 4,
        lambda: accept(*arguments),
    )


def target_softmax(batch: int) -> Case:
    """The target's distributions, which acceptance reads."""
    return distributions_of(batch, limited=False)


def limited_softmax(batch: int) -> Case:
    """The same within top-k 20 and top-p 0.95; the twin sorts the vocabulary."""
    return distributions_of(batch, limited=True)


def draw_tokens(batch: int) -> Case:
    """The drafts of whole blocks; the rows are read twice."""
    from dflash_plugin.kernels.draw_tokens import draw_tokens, draw_tokens_naive

    probs = random(batch, DRAFTS, VOCABULARY).float().abs()
    u = torch.rand(batch, DRAFTS, dtype=torch.float64, device=DEVICE)
    return Case(
        lambda: draw_tokens(probs, u), lambda: draw_tokens_naive(probs, u), 2 * probs.nbytes
    )


def distributions_of(batch: int, limited: bool) -> Case:
    """Blocks of logits as peaked as a target's: a few tokens hold most of the probability."""
    from dflash_plugin.kernels.limited_softmax import (
        TokenLimits,
        limited_softmax,
        limited_softmax_naive,
    )

    logits = 6 * random(batch, DRAFTS + 1, VOCABULARY)
    temperature = torch.full((batch, DRAFTS + 1), 0.8, device=DEVICE)
    limits = None
    if limited:
        top_p, min_p = (torch.full((batch,), value, device=DEVICE) for value in (0.95, 0.0))
        limits = TokenLimits(torch.full((batch,), 20, device=DEVICE), top_p, min_p)
    return Case(
        lambda: limited_softmax(logits, temperature, limits),
        lambda: limited_softmax_naive(logits, temperature, limits),
        logits.nbytes * 3,
    )


def accept_greedy(batch: int) -> Case:
    """Half of every block was verified."""
    from dflash_plugin.kernels.accept_greedy import accept_greedy, accept_greedy_naive

    verified = BLOCK // 2
    drafts = torch.randint(VOCABULARY, (batch, DRAFTS), device=DEVICE)
    best = torch.randint(VOCABULARY, (batch * verified,), device=DEVICE)
    place = torch.arange(BLOCK, device=DEVICE).clamp(max=verified - 1)
    rows = torch.arange(batch, device=DEVICE)[:, None] * verified + place
    return Case(
        lambda: accept_greedy(drafts, best, rows),
        lambda: accept_greedy_naive(drafts, best, rows),
        drafts.nbytes + best.nbytes + rows.nbytes,
    )


def counts_of(batch: int, value: int) -> Tensor:
    return torch.full((batch,), value, dtype=torch.int32, device=DEVICE)


def admit_drafts(batch: int) -> Case:
    """Half of the drafts of all requests."""
    from dflash_plugin.kernels.admit_drafts import admit_drafts, admit_drafts_naive

    acceptance = torch.rand(batch, DRAFTS, device=DEVICE)
    slots, drafts = torch.arange(batch, device=DEVICE), counts_of(batch, DRAFTS)
    outputs = counts_of(batch, 0), counts_of(batch + 1, 0), counts_of(batch + 1, 0)
    arguments = (acceptance, slots, drafts, counts_of(batch, 1), batch * DRAFTS // 2, *outputs)
    return Case(
        lambda: admit_drafts(*arguments),
        lambda: admit_drafts_naive(*arguments),
        acceptance.nbytes,
    )


def cut_blocks(batch: int) -> Case:
    """Every second row of every block."""
    from dflash_plugin.kernels.cut_blocks import cut_blocks, cut_blocks_naive

    tokens = torch.randint(VOCABULARY, (batch, BLOCK), device=DEVICE)
    flat, verified = torch.arange(batch * BLOCK, device=DEVICE), BLOCK // 2
    starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * verified
    rows = batch * verified
    arguments = (tokens, flat, flat, rows, starts, counts_of(rows, 0))
    return Case(
        lambda: cut_blocks(*arguments),
        lambda: cut_blocks_naive(*arguments),
        7 * tokens.nbytes,
    )


def predict_acceptance(batch: int) -> Case:
    from dflash_plugin.kernels.predict_acceptance import (
        predict_acceptance,
        predict_acceptance_naive,
    )

    top = torch.randn(batch * DRAFTS, device=DEVICE)
    requests = torch.arange(batch, device=DEVICE).repeat_interleave(DRAFTS)
    drafts = torch.arange(DRAFTS, device=DEVICE).repeat(batch)
    slope, offsets = torch.ones(DRAFTS, device=DEVICE), torch.zeros(DRAFTS, device=DEVICE)
    outputs = torch.zeros(2, batch, DRAFTS, device=DEVICE).unbind()
    arguments = (top, top + 1, requests, drafts, slope, offsets, *outputs)
    return Case(
        lambda: predict_acceptance(*arguments),
        lambda: predict_acceptance_naive(*arguments),
        4 * top.nbytes + 2 * requests.nbytes,
    )


def learn_acceptance(batch: int) -> Case:
    from dflash_plugin.adaptive.acceptance_model import AcceptanceModel
    from dflash_plugin.kernels.learn_acceptance import learn_acceptance, learn_acceptance_naive

    model, confidences = AcceptanceModel(DRAFTS, DEVICE), torch.randn(batch, DRAFTS, device=DEVICE)
    state = model.state, model.prior_precision, model.fade
    committed = counts_of(batch, 1 + DRAFTS // 2)
    return Case(
        lambda: learn_acceptance(confidences, committed, None, *state),
        lambda: learn_acceptance_naive(confidences, committed, None, *state),
        confidences.nbytes,
    )


def draft_attention(context: int) -> Case:
    """One request behind ``context`` positions; the bytes are its keys and values."""
    return attention(1, context)


def draft_attention_batch(batch: int) -> Case:
    """Requests behind 512 positions each."""
    return attention(batch, 512)


def attention(batch: int, context: int) -> Case:
    """The block of ``batch`` requests, as SGLang lists their slots."""
    from dflash_plugin.kernels.draft_attention import (
        PagedContext,
        draft_attention,
        draft_attention_naive,
    )

    count = batch * context
    keys, values = (random(count + 1, KV_HEADS, HEAD_DIM) for _ in "kv")
    slots = torch.randperm(count, device=DEVICE).view(batch, context)
    lengths = torch.full((batch,), context, device=DEVICE)
    paged = PagedContext(keys, values, slots.int(), lengths)
    block = [random(batch, BLOCK, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arguments = (*block, paged, HEAD_DIM**-0.5)
    return Case(
        lambda: draft_attention(*arguments, causal=True),
        lambda: draft_attention_naive(*arguments, causal=True),
        keys.nbytes + values.nbytes,
        sglang_attention(block, paged),
    )


def sglang_attention(block: list[Tensor], paged: Any) -> Run | None:
    """SGLang's Triton back end, of a verify pass, its lists of slots not counted."""
    try:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
    except ImportError:
        return None
    query, key, value = (part.flatten(0, 1) for part in block)
    out = torch.empty_like(query)
    rows = torch.arange(0, len(query) + 1, BLOCK, dtype=torch.int32, device=DEVICE)
    batch, context = paged.slot_table.shape
    starts = torch.arange(0, batch * context + 1, context, dtype=torch.int32, device=DEVICE)
    slots = paged.slot_table.flatten().long()
    return lambda: extend_attention_fwd(
        query, key, value, out, paged.keys, paged.values, rows, starts, slots, None, True,
        None, BLOCK, 1.0, 1.0, HEAD_DIM**-0.5,
    )  # fmt: skip


ROWS = (16, 128, 1024, 16384)
REQUESTS = (1, 4, 16, 64)
DRAFTING = tuple(DRAFTS * requests for requests in REQUESTS)
OPS: dict[Callable[[int], Case], tuple[int, ...]] = {
    add_rms_norm: ROWS,
    grouped_convolution: ROWS,
    convolve_add_rms_norm: ROWS,
    kernel_projection: (16, 64, 256, 1024),
    projected_convolution: (16, 32, 64),
    select_path: REQUESTS,
    select_path_greedy: REQUESTS,
    uniforms: REQUESTS,
    gated_act: ROWS,
    qk_norm_rope: ROWS,
    quantize_rows: ROWS,
    inject_kv: ROWS,
    draft_head: DRAFTING,
    draft_head_candidates: DRAFTING,
    best_logits: DRAFTING,
    draft_head_fp8: DRAFTING,
    fp8_linear: (16, 64, 256, 1024),
    fp8_product: (16, 32, 64),
    fp8_product_down: (16, 32, 64, 128, 256),
    accept: REQUESTS,
    accept_block: REQUESTS,
    accept_block_candidates: REQUESTS,
    target_softmax: REQUESTS,
    limited_softmax: REQUESTS,
    draw_tokens: REQUESTS,
    accept_greedy: REQUESTS,
    admit_drafts: REQUESTS,
    cut_blocks: REQUESTS,
    predict_acceptance: REQUESTS,
    learn_acceptance: REQUESTS,
    draft_attention: (512, 1024, 8192, 32768),
    draft_attention_batch: (8, 64),
}


def microseconds(run: Run, *, captured: bool = True) -> float:
    """Median time of an op with a cold L2 cache.

    Captured, what the host takes to launch does not count, as in an engine's CUDA graph; the time
    that the same graph takes to clear the cache alone is taken off.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    if not captured:
        return do_bench(run, return_mode="median") * 1e3
    # Replays run on a stream of their own, which does not wait for what made the arguments.
    torch.cuda.synchronize()
    cache = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)

    def cleared() -> None:
        cache.zero_()
        run()

    both, clearing = (
        do_bench_cudagraph(one, rep=10, return_mode="median") for one in (cleared, cache.zero_)
    )
    return (both - clearing) * 1e3


def measure(make: Callable[[int], Case], rows: int) -> dict[str, object]:
    case = make(rows)
    # A copy reads and writes every byte.
    source = torch.empty(case.moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = {
        "kernel_us": microseconds(case.kernel),
        # Twins may wait for the host.
        "twin_us": microseconds(case.twin, captured=False),
        "copy_us": microseconds(lambda: target.copy_(source)),
    }
    if case.engine is not None:
        times["engine_us"] = microseconds(case.engine)
        # What an engine launches one by one takes as long as the launches.
        times["engine_eager_us"] = microseconds(case.engine, captured=False)
    speed = case.moved / times["kernel_us"] / 1e3
    return {"op": make.__name__, "rows": rows, "bytes": case.moved, **times, "kernel_gb_s": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", default=",".join(op.__name__ for op in OPS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    wanted = options.ops.split(",")
    if unknown := set(wanted) - {op.__name__ for op in OPS}:
        known = ", ".join(op.__name__ for op in OPS)
        sys.exit(f"--ops names {', '.join(sorted(unknown))}; there are {known}")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA device, and torch sees none")
    import triton

    record = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "dtype": "bfloat16",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.date.today().isoformat(),
        "rows": [
            measure(make, rows)
            for make, sizes in OPS.items()
            if make.__name__ in wanted
            for rows in sizes
        ],
    }
    text = json.dumps(record, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
