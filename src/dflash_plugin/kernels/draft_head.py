"""The output head with the choice of tokens in its epilogue: logits are not written.

A first launch multiplies tiles of rows by tiles of the vocabulary and keeps each tile's best token
and log-sum-exp; a second one merges the tiles. Where several tokens are wanted, the first keeps the
scores too, a second finds the tiles with the largest of them, and a third looks only into these.
Ranks that hold shards of the vocabulary merge like tiles, by ``merge_heads``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dflash_plugin.decoding.sampling import Stream, philox
from dflash_plugin.kernels.common import ProductTile, dot, dot_precision, noise_bits, overlap

MAX_TOP_K = 16
NO_TOKEN = (1 << 31) - 1
# Tiles of a row that one program looks through for the best.
SEGMENT = 128
# A key below that of any score.
NO_KEY = tl.constexpr(-(1 << 63))


class HeadChoice(NamedTuple):
    """The best tokens of each row, best first, and the normalizer of its distribution.

    Attributes:
        tokens: int64 [T, k].
        scores: float32 [T, k], what tokens are ranked by: the logits, with noise where drawn.
        logits: float32 [T, k], scaled, capped and divided by the row's temperature.
        log_sum_exp: float32 [T], over all such logits: log q(token) is logits - log_sum_exp.
    """

    tokens: Tensor
    scores: Tensor
    logits: Tensor
    log_sum_exp: Tensor


class Drawing(NamedTuple):
    """Draw tokens instead of choosing them, by the Gumbel maximum.

    Attributes:
        temperature: float32 [T]; rows at 0 are chosen.
        seed: int64 [T], of the row's request.
        place: int64 [T], absolute position of the token that is drawn.
    """

    temperature: Tensor
    seed: Tensor
    place: Tensor


@triton.jit
def _gumbel(seed, place, token, STREAM: tl.constexpr):
    """Gumbel noise, float32, of each row's request, place and token."""
    bits, _, _, _ = noise_bits(seed, place, token, STREAM)
    # 24 bits and a half: neither 0 nor 1.
    uniform = ((bits >> 8).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / (1 << 24))
    return -tl.log(-tl.log(uniform))


@triton.jit
def bent(logits, scale, softcap):
    """Logits float32 with the drafter's scale and, unless it is None, its soft-cap."""
    logits = logits * scale
    if softcap is not None:
        # tanh by exponentials, which neither overflows nor needs a library.
        raised = tl.exp(-2.0 * tl.abs(logits / softcap))
        size = softcap * (1.0 - raised) / (1.0 + raised)
        logits = tl.where(logits < 0, -size, size)
    return logits


# Compiled once for any number of rows: a server meets all of them.
@triton.jit(do_not_specialize=["rows"])
def _tile_kernel(
    hidden,
    hidden_scale,
    weight,
    weight_scale,
    temperature,
    seed,
    place,
    tokens_out,
    scores_out,
    logits_out,
    log_sum_exp_out,
    all_scores,
    all_logits,
    rows,
    vocabulary,
    width,
    first_token,
    hidden_stride,
    weight_stride,
    scale,
    softcap,
    STREAM: tl.constexpr,
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
    logits = bent(total, scale, softcap)
    scores = logits
    if temperature is not None:
        heat = tl.load(temperature + row, mask=is_row, other=0.0)
        draws = (heat > 0)[None, :]
        logits = logits / tl.where(heat > 0, heat, 1.0)[None, :]
        noise = _gumbel(
            tl.load(seed + row, mask=is_row, other=0)[None, :],
            tl.load(place + row, mask=is_row, other=0)[None, :],
            (token + first_token)[:, None],
            STREAM,
        )
        scores = tl.where(draws, logits + noise, logits)
    outside = tl.where(is_token, 0.0, float("-inf"))[:, None]
    logits += outside
    scores += outside
    tiles = tl.num_programs(0) // row_tiles
    out = row.to(tl.int64) * tiles + tile
    top = tl.max(logits, axis=0)
    tl.store(
        log_sum_exp_out + out,
        top + tl.log(tl.sum(tl.exp(logits - top[None, :]), axis=0)),
        mask=is_row,
    )
    best = tl.max(scores, axis=0)
    tl.store(scores_out + out, best, mask=is_row)
    if all_scores is not None:
        at = row.to(tl.int64)[None, :] * vocabulary + token[:, None]
        inside = is_token[:, None] & is_row[None, :]
        tl.store(all_scores + at, scores, mask=inside)
        if temperature is not None:
            tl.store(all_logits + at, logits, mask=inside)
    else:
        # The first of equal ones, as argmax gives.
        found = tl.min(tl.where(scores == best[None, :], token[:, None], NO_TOKEN), axis=0)
        # Nothing equals NaN; the token then is wrong but one of the vocabulary's.
        found = tl.minimum(found, vocabulary - 1)
        chosen = token[:, None] == found[None, :]
        logit = tl.max(tl.where(chosen, logits, float("-inf")), axis=0)
        tl.store(tokens_out + out, found + first_token, mask=is_row)
        tl.store(logits_out + out, logit, mask=is_row)


@triton.jit
def _ranked(scores, index):
    """Keys int64 that sort as scores float32 do; of equal ones the least index is the largest."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # No zero is below another.
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _score(keys):
    """The scores of ``_ranked``."""
    order = (keys >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index(keys):
    """The indices of ``_ranked``."""
    return (0xFFFFFFFF - (keys & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _largest(keys, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest keys, in order; one reduction each."""
    rank = tl.arange(0, BLOCK_K)
    best = tl.full((BLOCK_K,), NO_KEY, dtype=tl.int64)
    for place in tl.static_range(TOP_K):
        found = tl.max(keys, axis=0)
        best = tl.where(rank == place, found, best)
        keys = tl.where(keys == found, NO_KEY, keys)
    return best


@triton.jit
def _segment_kernel(
    maxima,
    log_sum_exp,
    keys_out,
    sums_out,
    tiles,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * SEGMENT + tl.arange(0, SEGMENT)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    at = row * tiles + tile
    maximum = tl.load(maxima + at, mask=tile < tiles, other=float("-inf"))
    part = row * tl.num_programs(1) + tl.program_id(1)
    best = _largest(_ranked(maximum, tile), TOP_K, BLOCK_K)
    tl.store(keys_out + part * BLOCK_K + tl.arange(0, BLOCK_K), best)
    sums = tl.load(log_sum_exp + at, mask=tile < tiles, other=float("-inf"))
    top = tl.max(sums, axis=0)
    # A segment may hold nothing but -inf.
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(sums_out + part, base + tl.log(tl.sum(tl.exp(sums - base), axis=0)))


@triton.jit
def _best_kernel(
    all_scores,
    all_logits,
    keys,
    sums,
    tokens_out,
    scores_out,
    logits_out,
    log_sum_exp_out,
    vocabulary,
    tiles,
    segments,
    row_stride,
    first_token,
    scale,
    softcap,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        gdc_wait()
    slot = tl.arange(0, BLOCK_SEGMENTS * BLOCK_K)
    filled = segments * BLOCK_K
    key = tl.load(keys + row * filled + slot, mask=slot < filled, other=NO_KEY)
    rank = tl.arange(0, BLOCK_K)
    is_rank = rank < TOP_K
    # As many tokens come before any of another tile as there are tiles here.
    best_tiles = tl.where(is_rank, _index(_largest(key, TOP_K, BLOCK_K)), tiles)
    token = best_tiles[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    token = tl.reshape(token, (BLOCK_K * COLUMNS,))
    all_scores += row * row_stride
    score = tl.load(all_scores + token, mask=token < vocabulary, other=float("-inf"))
    best = _largest(_ranked(score.to(tl.float32), token), TOP_K, BLOCK_K)
    token = tl.minimum(_index(best), vocabulary - 1)
    score = _score(best)
    if all_logits is None:
        logit = score
    else:
        logit = tl.load(all_logits + row * row_stride + token, mask=is_rank, other=0.0)
    out = row * TOP_K + rank
    tl.store(tokens_out + out, (token + first_token).to(tl.int64), mask=is_rank)
    tl.store(scores_out + out, bent(score, scale, softcap), mask=is_rank)
    tl.store(logits_out + out, bent(logit, scale, softcap), mask=is_rank)
    segment = tl.arange(0, BLOCK_SEGMENTS)
    parts_at = sums + row * segments + segment
    parts = tl.load(parts_at, mask=segment < segments, other=float("-inf"))
    top = tl.max(parts, axis=0)
    tl.store(log_sum_exp_out + row, top + tl.log(tl.sum(tl.exp(parts - top), axis=0)))


@triton.jit
def _merge_kernel(
    tokens,
    scores,
    logits,
    log_sum_exp,
    tokens_out,
    scores_out,
    logits_out,
    log_sum_exp_out,
    tiles,
    TOP_K: tl.constexpr,
    NO_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < tiles * TOP_K
    source = row * tiles * TOP_K + at
    token = tl.load(tokens + source, mask=inside, other=NO_TOKEN)
    score = tl.load(scores + source, mask=inside, other=float("-inf"))
    logit = tl.load(logits + source, mask=inside, other=float("-inf"))
    for place in tl.static_range(TOP_K):
        best = tl.max(score, axis=0)
        found = tl.min(tl.where(score == best, token, NO_TOKEN), axis=0)
        found = tl.where(found == NO_TOKEN, tl.min(token, axis=0), found)
        chosen = token == found
        tl.store(tokens_out + row * TOP_K + place, found.to(tl.int64))
        tl.store(scores_out + row * TOP_K + place, best)
        value = tl.max(tl.where(chosen, logit, float("-inf")), axis=0)
        tl.store(logits_out + row * TOP_K + place, value)
        score = tl.where(chosen, float("-inf"), score)
    tile = tl.arange(0, BLOCK_TILES)
    parts = tl.load(log_sum_exp + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    top = tl.max(parts, axis=0)
    tl.store(log_sum_exp_out + row, top + tl.log(tl.sum(tl.exp(parts - top), axis=0)))


def _tile(rows: int, hidden: Tensor, top_k: int, draws: bool) -> ProductTile:
    """A tile for T rows; few rows wait for the weights, many for the multipliers.

    The fastest of those tried on an H100 (``benchmarks/kernels.py``).
    """
    wide = 256 // hidden.itemsize  # A row of a tile is 256 bytes.
    least = max(16, 32 // hidden.itemsize)  # That a matrix unit takes.
    depth = min(wide if rows > 16 else 256, max(least, triton.next_power_of_2(hidden.shape[1])))
    if draws:  # Noise takes registers.
        return ProductTile(16 if rows <= 16 else 32, 128, min(128, depth), 8, 4)
    if rows <= 16:
        return ProductTile(16, 64, depth, 4, 5)
    if rows <= 64:
        return ProductTile(32 if rows <= 32 else 64, 128, depth, 4, 4)
    return ProductTile(128, 256 if top_k == 1 else 128, max(least, depth // 2), 8, 4)


def draft_head(
    hidden: Tensor,
    weight: Tensor,
    *,
    hidden_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    top_k: int = 1,
    drawing: Drawing | None = None,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    tile: ProductTile | None = None,
) -> HeadChoice:
    """The best tokens of each row under ``softcap * tanh(scale * hidden @ weight.T / softcap)``.

    Products are summed in float32 and nothing is rounded after that. Of equal logits the first
    token wins. Drawn tokens are the first of the logits with Gumbel noise (Maddison et al., arXiv
    1411.0030), which is keyed by request, position and token, so that neither the batch nor the
    number of shards changes them.

    Args:
        hidden: float32, bfloat16 or float16 [T, H], or float8_e4m3fn with both scales; last
            dimension contiguous.
        weight: [V, H] in hidden's dtype, or float8_e4m3fn with ``weight_scale``; this rank's rows.
        hidden_scale: float32 [T], multiplies the rows of ``hidden``, or None.
        weight_scale: float32 [V], multiplies the rows of ``weight``, or None.
        top_k: tokens of a row, from 1 to 16.
        drawing: of rows whose tokens are drawn, or None.
        first_token: id of the first row of ``weight``.
        scale: on logits.
        softcap: bends logits, or None.
        tile: of the first launch; None chooses one by T.

    Raises:
        ValueError: shapes or dtypes do not fit, ``top_k`` is out of its range or larger than V.
    """
    rows, vocabulary = _check(hidden, weight, hidden_scale, weight_scale, top_k, drawing)
    tile = tile or _tile(rows, hidden, top_k, drawing is not None)
    tiles = triton.cdiv(vocabulary, tile.columns)

    def empty(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=hidden.device)

    parts = HeadChoice(empty(tiles, torch.int32), empty(tiles), empty(tiles), empty(tiles))
    all_scores = empty(vocabulary) if top_k > 1 else None
    all_logits = None if drawing is None or top_k == 1 else empty(vocabulary)
    if rows > 0:
        _tile_kernel[(triton.cdiv(rows, tile.rows) * tiles,)](
            hidden,
            hidden_scale,
            weight,
            weight_scale,
            *(drawing or (None, None, None)),
            *parts,
            all_scores,
            all_logits,
            rows,
            vocabulary,
            hidden.shape[1],
            first_token,
            hidden.stride(0),
            weight.stride(0),
            scale,
            softcap,
            STREAM=int(Stream.DRAFT),
            PRECISION=dot_precision(hidden.dtype),
            NO_TOKEN=NO_TOKEN,
            BLOCK_ROWS=tile.rows,
            BLOCK_VOCABULARY=tile.columns,
            BLOCK_WIDTH=tile.width,
            num_warps=tile.warps,
            num_stages=tile.stages_that_fit(hidden, weight),
        )
    if all_scores is None:
        return merge_heads(parts, top_k)
    scored = ScoredTiles(all_scores, all_logits, parts.scores, parts.log_sum_exp, tile.columns)
    return best_of_tiles(scored, top_k, first_token)


class ScoredTiles(NamedTuple):
    """Scores of whole rows, and what is known of their tiles.

    Attributes:
        scores: [T, V], what tokens are ranked by.
        logits: alike, None where nothing is drawn and they are the scores.
        maxima: float32 [T, tiles], the largest score of each tile.
        log_sum_exp: float32 [T, tiles], over each tile's logits.
        columns: of a tile, a power of two.
    """

    scores: Tensor
    logits: Tensor | None
    maxima: Tensor
    log_sum_exp: Tensor
    columns: int


def best_of_tiles(
    scored: ScoredTiles,
    top_k: int,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> HeadChoice:
    """The best tokens of rows whose tiles are known.

    Args:
        scored: its scores' rows may be strided.
        top_k: tokens of a row.
        first_token: id of the first column.
        scale: on scores and logits of what is chosen.
        softcap: bends them, or None.
    """
    (rows, tiles), vocabulary = scored.maxima.shape, scored.scores.shape[1]
    best = _empty_choice(rows, top_k, scored.scores.device)
    if rows > 0:
        device, block_k = scored.scores.device, triton.next_power_of_2(top_k)
        segment = max(block_k, min(SEGMENT, triton.next_power_of_2(tiles)))
        segments = triton.cdiv(tiles, segment)
        keys = torch.empty(rows, segments, block_k, dtype=torch.int64, device=device)
        sums = torch.empty(rows, segments, dtype=torch.float32, device=device)
        overlaps = overlap(device)
        _segment_kernel[rows, segments](
            scored.maxima,
            scored.log_sum_exp,
            keys,
            sums,
            tiles,
            TOP_K=top_k,
            BLOCK_K=block_k,
            SEGMENT=segment,
            OVERLAP=bool(overlaps),
            num_warps=1,
            **overlaps,
        )
        _best_kernel[(rows,)](
            scored.scores,
            scored.logits,
            keys,
            sums,
            *best,
            vocabulary,
            tiles,
            segments,
            scored.scores.stride(0),
            first_token,
            scale,
            softcap,
            COLUMNS=scored.columns,
            TOP_K=top_k,
            BLOCK_K=block_k,
            BLOCK_SEGMENTS=triton.next_power_of_2(segments),
            OVERLAP=bool(overlaps),
            num_warps=4,
            **overlaps,
        )
    return best


def _empty_choice(rows: int, top_k: int, device: torch.device) -> HeadChoice:
    return HeadChoice(
        torch.empty(rows, top_k, dtype=torch.int64, device=device),
        torch.empty(rows, top_k, dtype=torch.float32, device=device),
        torch.empty(rows, top_k, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def merge_heads(parts: HeadChoice, top_k: int) -> HeadChoice:
    """The best tokens over tiles or shards of the vocabulary.

    Args:
        parts: tokens (int32 or int64), scores and logits [T, parts * top_k], and log_sum_exp [T,
            parts], side by side.
        top_k: tokens of a row in each part and in the result.
    """
    rows, tiles = parts.log_sum_exp.shape
    merged = _empty_choice(rows, top_k, parts.tokens.device)
    if rows > 0:
        block = triton.next_power_of_2(tiles * top_k)
        _merge_kernel[(rows,)](
            *(part.contiguous() for part in parts),
            *merged,
            tiles,
            TOP_K=top_k,
            NO_TOKEN=NO_TOKEN,
            BLOCK=block,
            BLOCK_TILES=triton.next_power_of_2(tiles),
            num_warps=max(1, min(8, block // 256)),
        )
    return merged


def _check(
    hidden: Tensor,
    weight: Tensor,
    hidden_scale: Tensor | None,
    weight_scale: Tensor | None,
    top_k: int,
    drawing: Drawing | None,
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
    if drawing is not None and any(part.shape != (rows,) for part in drawing):
        raise ValueError(f"temperature, seed and place must each be [{rows}]")
    return rows, vocabulary


def draft_head_naive(
    hidden: Tensor,
    weight: Tensor,
    *,
    hidden_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    top_k: int = 1,
    drawing: Drawing | None = None,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    tile: ProductTile | None = None,
) -> HeadChoice:
    """``draft_head`` in plain torch, which writes the logits."""
    _check(hidden, weight, hidden_scale, weight_scale, top_k, drawing)
    logits = F.linear(hidden.float(), weight.float())
    if weight_scale is not None:
        logits = logits * weight_scale
    if hidden_scale is not None:
        logits = logits * hidden_scale[:, None]
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    scores = logits
    if drawing is not None:
        heat = drawing.temperature[:, None]
        logits = logits / torch.where(heat > 0, heat, 1.0)
        tokens = first_token + torch.arange(weight.shape[0], device=hidden.device)
        noise = gumbel_naive(drawing.seed, drawing.place, tokens)
        scores = torch.where(heat > 0, logits + noise, logits)
    order = scores.sort(dim=-1, descending=True, stable=True)
    best = order.indices[:, :top_k]
    return HeadChoice(
        best + first_token,
        order.values[:, :top_k],
        logits.gather(-1, best),
        logits.logsumexp(dim=-1),
    )


def gumbel_naive(seed: Tensor, place: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise float32 [T, V] of seeds [T], places [T] and token ids [V]."""
    low = 0xFFFFFFFF
    counter = (place & low, place >> 32, torch.full_like(place, int(Stream.DRAFT)))
    key = ((seed & low)[:, None], ((seed >> 32) & low)[:, None])
    spread = [part[:, None].expand(-1, len(tokens)) for part in counter]
    bits = philox((*spread, tokens.expand(len(place), -1)), key)[0]
    uniform = ((bits >> 8).float() + 0.5) / (1 << 24)
    return -torch.log(-torch.log(uniform))
