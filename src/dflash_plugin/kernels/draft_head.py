"""The output head with the choice of tokens in its epilogue: for one token, no logits are written.

A first launch multiplies tiles of rows by tiles of the vocabulary and keeps each tile's best token
and log-sum-exp; a second launch merges the tiles. Where several tokens are wanted, the first launch
writes the logits too, and ``best_of_tiles`` looks through them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.common import ProductTile, dot, dot_precision
from dflash_plugin.kernels.language import tl, triton
from dflash_plugin.kernels.vocab_topk import (
    MAX_TOP_K,
    HeadChoice,
    Tiles,
    best_of_tiles,
    soft_capped,
)

NO_TOKEN = (1 << 31) - 1


# Compiled once for any number of rows: a server meets all of them.
@triton.jit(do_not_specialize=["rows"])
def _tile_kernel(
    hidden,
    hidden_scale,
    weight,
    weight_scale,
    tokens_out,
    maxima_out,
    log_sum_exp_out,
    all_logits,
    rows,
    vocabulary,
    width,
    first_token,
    hidden_stride,
    weight_stride,
    scale,
    softcap,
    PRECISION: tl.constexpr,
    NO_TOKEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCABULARY: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    # Programs that share weights run next to each other.
    row = (tl.program_id(0) % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(0) // row_tiles
    token = tile * BLOCK_VOCABULARY + tl.arange(0, BLOCK_VOCABULARY)
    is_row = row < rows
    is_token = token < vocabulary
    depth = tl.arange(0, BLOCK_WIDTH)
    # Weights stand on the left, where Hopper's products take registers: what was converted there
    # need not go back to shared memory. So tiles are [token, row].
    w_at = weight + token.to(tl.int64)[:, None] * weight_stride + depth[None, :]
    x_at = hidden + row.to(tl.int64)[None, :] * hidden_stride + depth[:, None]
    total = tl.zeros((BLOCK_VOCABULARY, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = depth < width - start
        w = tl.load(w_at + start, mask=is_token[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_at + start, mask=inside[:, None] & is_row[None, :], other=0.0)
        total = dot(w.to(x.dtype), x, total, PRECISION)
    if weight_scale is not None:
        total *= tl.load(weight_scale + token, mask=is_token, other=0.0)[:, None]
    if hidden_scale is not None:
        total *= tl.load(hidden_scale + row, mask=is_row, other=0.0)[None, :]
    logits = soft_capped(total, scale, softcap)
    logits += tl.where(is_token, 0.0, float("-inf"))[:, None]
    tiles = tl.num_programs(0) // row_tiles
    out = row.to(tl.int64) * tiles + tile
    best = tl.max(logits, axis=0)
    tl.store(maxima_out + out, best, mask=is_row)
    total = best + tl.log(tl.sum(tl.exp(logits - best[None, :]), axis=0))
    tl.store(log_sum_exp_out + out, total, mask=is_row)
    if all_logits is not None:
        at = row.to(tl.int64)[None, :] * vocabulary + token[:, None]
        tl.store(all_logits + at, logits, mask=is_token[:, None] & is_row[None, :])
    else:
        # The first of equal logits, as argmax gives.
        found = tl.min(tl.where(logits == best[None, :], token[:, None], NO_TOKEN), axis=0)
        # No logit equals NaN: the token is then wrong, but one of the vocabulary's.
        found = tl.minimum(found, vocabulary - 1)
        tl.store(tokens_out + out, found + first_token, mask=is_row)


@triton.jit
def _merge_kernel(
    tokens,
    maxima,
    log_sum_exp,
    tokens_out,
    logits_out,
    log_sum_exp_out,
    tiles,
    NO_TOKEN: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_TILES)
    inside = tile < tiles
    at = row * tiles + tile
    token = tl.load(tokens + at, mask=inside, other=NO_TOKEN)
    maximum = tl.load(maxima + at, mask=inside, other=float("-inf"))
    best = tl.max(maximum, axis=0)
    found = tl.min(tl.where(maximum == best, token, NO_TOKEN), axis=0)
    # No maximum equals NaN: take a token of the vocabulary.
    found = tl.where(found == NO_TOKEN, tl.min(token, axis=0), found)
    tl.store(tokens_out + row, found.to(tl.int64))
    tl.store(logits_out + row, best)
    parts = tl.load(log_sum_exp + at, mask=inside, other=float("-inf"))
    top = tl.max(parts, axis=0)
    tl.store(log_sum_exp_out + row, top + tl.log(tl.sum(tl.exp(parts - top), axis=0)))


def _tile(rows: int, hidden: Tensor, top_k: int) -> ProductTile:
    """A tile for T rows; few rows wait for the weights, many for the multipliers.

    The fastest of those tried on an H100 (``benchmarks/kernels.py``).
    """
    wide = 256 // hidden.itemsize  # A row of a tile is 256 bytes.
    min_depth = max(16, 32 // hidden.itemsize)  # What a matrix unit takes.
    width = max(min_depth, triton.next_power_of_2(hidden.shape[1]))
    depth = min(wide if rows > 16 else 256, width)
    if rows <= 16:
        return ProductTile(16, 64, depth, 4, 5)
    if rows <= 64:
        return ProductTile(32 if rows <= 32 else 64, 128, depth, 4, 4)
    return ProductTile(128, 256 if top_k == 1 else 128, max(min_depth, depth // 2), 8, 4)


@with_twin
def draft_head(
    hidden: Tensor,
    weight: Tensor,
    *,
    hidden_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    top_k: int = 1,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    tile: ProductTile | None = None,
) -> HeadChoice:
    """The best tokens of each row under ``softcap * tanh(scale * hidden @ weight.T / softcap)``.

    Products are summed in float32 and nothing is rounded after that. Of equal logits the first
    token wins.

    Args:
        hidden: float32, bfloat16 or float16 [T, H], or float8_e4m3fn with both scales; last
            dimension contiguous.
        weight: [V, H] in hidden's dtype, or float8_e4m3fn with ``weight_scale``; this rank's rows.
        hidden_scale: float32 [T], multiplies the rows of ``hidden``, or None.
        weight_scale: float32 [V], multiplies the rows of ``weight``, or None.
        top_k: tokens of a row, from 1 to 16.
        first_token: id of the first row of ``weight``.
        scale: multiplies the logits.
        softcap: soft-cap of the logits, or None.
        tile: of the first launch; None chooses one by T.

    Raises:
        ValueError: shapes or dtypes do not fit, ``top_k`` is out of its range or larger than V.
    """
    rows, vocabulary = _check(hidden, weight, hidden_scale, weight_scale, top_k)
    tile = tile or _tile(rows, hidden, top_k)
    tiles = triton.cdiv(vocabulary, tile.columns)

    def empty(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=hidden.device)

    tokens, maxima, log_sum_exp = empty(tiles, torch.int32), empty(tiles), empty(tiles)
    all_logits = empty(vocabulary) if top_k > 1 else None
    if rows > 0:
        _tile_kernel[(triton.cdiv(rows, tile.rows) * tiles,)](
            hidden,
            hidden_scale,
            weight,
            weight_scale,
            tokens,
            maxima,
            log_sum_exp,
            all_logits,
            rows,
            vocabulary,
            hidden.shape[1],
            first_token,
            hidden.stride(0),
            weight.stride(0),
            scale,
            softcap,
            PRECISION=dot_precision(hidden.dtype),
            NO_TOKEN=NO_TOKEN,
            BLOCK_ROWS=tile.rows,
            BLOCK_VOCABULARY=tile.columns,
            BLOCK_WIDTH=tile.width,
            num_warps=tile.warps,
            num_stages=tile.stages_that_fit(hidden, weight),
        )
    if all_logits is not None:
        scored = Tiles(all_logits, maxima, log_sum_exp, tile.columns)
        return best_of_tiles(scored, top_k, first_token)
    best = HeadChoice(empty(1, torch.int64), empty(1), empty(1)[:, 0])
    if rows > 0:
        block = triton.next_power_of_2(tiles)
        _merge_kernel[(rows,)](
            tokens,
            maxima,
            log_sum_exp,
            *best,
            tiles,
            NO_TOKEN=NO_TOKEN,
            BLOCK_TILES=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return best


def _check(
    hidden: Tensor,
    weight: Tensor,
    hidden_scale: Tensor | None,
    weight_scale: Tensor | None,
    top_k: int,
) -> tuple[int, int]:
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    if weight.shape != (vocabulary, width) or vocabulary == 0:
        raise ValueError(f"weight is {list(weight.shape)}, not [V, {width}]")
    if hidden.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("the last dimensions of hidden and weight must be contiguous")
    if weight_scale is None and weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype} without a scale, hidden {hidden.dtype}")
    if weight_scale is not None and (
        weight_scale.shape != (vocabulary,) or weight_scale.dtype != torch.float32
    ):
        raise ValueError(f"weight_scale must be float32 [{vocabulary}]")
    if hidden_scale is not None and (
        hidden_scale.shape != (rows,) or hidden_scale.dtype != torch.float32
    ):
        raise ValueError(f"hidden_scale must be float32 [{rows}]")
    if hidden.dtype == torch.float8_e4m3fn and (hidden_scale is None or weight_scale is None):
        raise ValueError("hidden is float8_e4m3fn: give hidden_scale and weight_scale")
    if not 1 <= top_k <= min(MAX_TOP_K, vocabulary):
        raise ValueError(f"top_k is {top_k}: give 1 to {min(MAX_TOP_K, vocabulary)}")
    return rows, vocabulary


def draft_head_naive(
    hidden: Tensor,
    weight: Tensor,
    *,
    hidden_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    top_k: int = 1,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    tile: ProductTile | None = None,
) -> HeadChoice:
    """``draft_head`` in plain torch, which writes the logits."""
    _check(hidden, weight, hidden_scale, weight_scale, top_k)
    logits = F.linear(hidden.float(), weight.float())
    if weight_scale is not None:
        logits = logits * weight_scale
    if hidden_scale is not None:
        logits = logits * hidden_scale[:, None]
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    order = logits.sort(dim=-1, descending=True, stable=True)
    tokens = order.indices[:, :top_k] + first_token
    return HeadChoice(tokens, order.values[:, :top_k], order.values.logsumexp(dim=-1))
