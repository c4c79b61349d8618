"""The best tokens of rows of logits, which are read once.

A first launch keeps the maximum and the log-sum-exp of every tile of a row; ``best_of_tiles`` then
looks into the tiles with the largest maxima.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.language import tl, triton
from dflash_plugin.kernels.vocab_topk import (
    MAX_TOP_K,
    HeadChoice,
    Tiles,
    best_of_tiles,
    soft_capped,
)

COLUMNS = 128


@triton.jit
def _kernel(
    logits,
    maxima,
    log_sum_exp,
    vocabulary,
    tiles,
    row_stride,
    scale,
    softcap,
    COLUMNS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    token = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = token < vocabulary
    logit = tl.load(logits + row * row_stride + token, mask=inside, other=float("-inf"))
    logit = logit.to(tl.float32)
    is_tile = tile < tiles
    tl.store(maxima + row * tiles + tile, tl.max(logit, axis=1), mask=is_tile)
    logit = tl.where(inside, soft_capped(logit, scale, softcap), float("-inf"))
    top = tl.max(logit, axis=1)
    # A tile may hold nothing but -inf.
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(logit - base[:, None]), axis=1)
    tl.store(log_sum_exp + row * tiles + tile, base + tl.log(total), mask=is_tile)


@with_twin
def best_logits(
    logits: Tensor,
    top_k: int,
    *,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> HeadChoice:
    """The best tokens under ``softcap * tanh(scale * logits / softcap)``; of equal ones the first.

    Args:
        logits: float32, bfloat16 or float16 [T, V]; rows may be strided.
        top_k: tokens of a row, from 1 to 16.
        first_token: id of the first column.
        scale: multiplies the logits; above zero.
        softcap: soft-cap of the logits, or None.

    Raises:
        ValueError: the last dimension is not contiguous, or ``top_k`` is out of its range or larger
            than V.
    """
    rows, vocabulary = _check(logits, top_k)
    tiles = triton.cdiv(vocabulary, COLUMNS)
    maxima, log_sum_exp = torch.empty(2, rows, tiles, dtype=torch.float32, device=logits.device)
    if rows > 0:
        block = min(16, triton.next_power_of_2(tiles))
        _kernel[rows, triton.cdiv(tiles, block)](
            logits,
            maxima,
            log_sum_exp,
            vocabulary,
            tiles,
            logits.stride(0),
            scale,
            softcap,
            COLUMNS=COLUMNS,
            BLOCK_TILES=block,
            num_warps=4,
        )
    return best_of_tiles(
        Tiles(logits, maxima, log_sum_exp, COLUMNS), top_k, first_token, scale, softcap
    )


def _check(logits: Tensor, top_k: int) -> tuple[int, int]:
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("the last dimension of logits must be contiguous")
    if not 1 <= top_k <= min(MAX_TOP_K, vocabulary):
        raise ValueError(f"top_k is {top_k}: give 1 to {min(MAX_TOP_K, vocabulary)}")
    return rows, vocabulary


def best_logits_naive(
    logits: Tensor,
    top_k: int,
    *,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> HeadChoice:
    """``best_logits`` in plain torch."""
    _check(logits, top_k)
    order = logits.sort(dim=-1, descending=True, stable=True)
    ranked = order.values.float() * scale
    if softcap is not None:
        ranked = torch.tanh(ranked / softcap) * softcap
    tokens = order.indices[:, :top_k] + first_token
    return HeadChoice(tokens, ranked[:, :top_k], ranked.logsumexp(dim=-1))
