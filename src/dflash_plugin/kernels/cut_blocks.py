"""The rows of blocks that are verified, one request's behind the other's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class CutBlocks(NamedTuple):
    """What is left of B blocks of T rows, N rows in all.

    Attributes:
        tokens: int64 [N].
        positions: [N], in their own dtype.
        slots: [N], in their own dtype.
        sources: int64 [N], rows of the whole blocks [B * T] that they were.
        places: int64 [B * T], where each row of the whole blocks lies; those that are cut lie where
            their block ends.
        kept: int64 [B, T], the tokens with -1 for those that are cut.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    sources: Tensor
    places: Tensor
    kept: Tensor


@triton.jit(do_not_specialize=["batch", "given", "width"])
def _kernel(
    tokens,
    positions,
    slots,
    starts,
    requests,
    tokens_out,
    positions_out,
    slots_out,
    sources_out,
    places_out,
    kept_out,
    batch,
    given,
    width,
    tokens_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.arange(0, BLOCK)
    # Others, and those that pad a captured pass, have an even share each.
    side = tl.arange(0, 2)
    bound = request + side
    is_given = bound < given + side
    bounds = tl.load(starts + bound, mask=is_given, other=bound * width)
    begin, end = tl.min(bounds, axis=0), tl.max(bounds, axis=0)
    tl.store(starts + bound, bounds, mask=((side == 1) | (bound == 0)) & ~is_given)
    count = end - begin
    tl.store(requests + begin + row, request + row * 0, mask=row < count)
    is_row = (row < ROWS) & (request + row * 0 < batch)
    is_kept = is_row & (row < count)
    source = request.to(tl.int64) * ROWS + row
    token = tl.load(tokens + request.to(tl.int64) * tokens_stride + row, mask=is_row, other=0)
    tl.store(tokens_out + begin + row, token, mask=is_kept)
    tl.store(kept_out + source, tl.where(is_kept, token, -1), mask=is_row)
    position = tl.load(positions + source, mask=is_kept, other=0)
    tl.store(positions_out + begin + row, position, mask=is_kept)
    slot = tl.load(slots + source, mask=is_kept, other=0)
    tl.store(slots_out + begin + row, slot, mask=is_kept)
    tl.store(sources_out + begin + row, source, mask=is_kept)
    place = begin + tl.minimum(row, count - 1)
    tl.store(places_out + source, place.to(tl.int64), mask=is_row)


def cut_blocks(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    width: int,
    starts: Tensor,
    requests: Tensor,
    *,
    even: bool,
) -> CutBlocks:
    """Put the rows that are verified of B blocks behind each other, in one launch.

    Args:
        tokens: int64 [B, T], last dimension contiguous.
        positions: int32 or int64 [B * T], contiguous.
        slots: int32 or int64 [B * T], contiguous, where keys and values are written.
        width: rows of a block on average, of T at most.
        starts: int32 [at least B + 1], where each block begins, the last of them at B * width;
            those of requests beyond the batch are filled in, and with ``even`` all.
        requests: int32 [at least as many as ``starts`` has * width], takes whose each row is.
        even: every block keeps its first ``width`` rows.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, rows = _check(tokens, positions, slots, width, starts, requests)
    made = _empty(tokens, positions, slots, batch * width)
    capacity = starts.shape[0] - 1
    _kernel[(capacity,)](
        tokens,
        positions,
        slots,
        starts,
        requests,
        *made,
        batch,
        0 if even else batch,
        width,
        tokens.stride(0),
        ROWS=rows,
        BLOCK=triton.next_power_of_2(rows),
        num_warps=1,
    )
    return made


def _empty(tokens: Tensor, positions: Tensor, slots: Tensor, size: int) -> CutBlocks:
    return CutBlocks(
        tokens=tokens.new_empty(size),
        positions=positions.new_empty(size),
        slots=slots.new_empty(size),
        sources=tokens.new_empty(size),
        places=tokens.new_empty(tokens.numel()),
        kept=tokens.new_empty(tokens.shape),
    )


def _check(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    width: int,
    starts: Tensor,
    requests: Tensor,
) -> tuple[int, int]:
    batch, rows = tokens.shape
    if tokens.dtype != torch.int64 or tokens.stride(1) != 1:
        raise ValueError("tokens must be int64 [B, T] with contiguous rows")
    if not 1 <= width <= rows:
        raise ValueError(f"width is {width}: give 1 to {rows}")
    for name, part in (("positions", positions), ("slots", slots)):
        if part.shape != (batch * rows,) or not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{batch * rows}]")
    capacity = starts.shape[0] - 1
    for name, part, least in (
        ("starts", starts, batch + 1),
        ("requests", requests, capacity * width),
    ):
        if part.dim() != 1 or part.shape[0] < least or part.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{least}] or longer")
    return batch, rows


def cut_blocks_naive(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    width: int,
    starts: Tensor,
    requests: Tensor,
    *,
    even: bool,
) -> CutBlocks:
    """``cut_blocks`` in plain torch; reads back to the host."""
    batch, rows = _check(tokens, positions, slots, width, starts, requests)
    capacity = starts.shape[0] - 1
    shares = torch.arange(capacity + 1, dtype=torch.int32, device=starts.device) * width
    if even:
        starts.copy_(shares)
    starts[batch + 1 :] = shares[batch + 1 :]
    counts = starts.diff()
    owners = torch.arange(capacity, dtype=torch.int32, device=starts.device)
    requests[: capacity * width] = owners.repeat_interleave(counts)
    row = torch.arange(rows, device=tokens.device)
    is_kept = row < counts[:batch, None]
    places = starts[:batch, None].long() + torch.minimum(row, counts[:batch, None].long() - 1)
    return CutBlocks(
        tokens=tokens[is_kept],
        positions=positions.view(batch, rows)[is_kept],
        slots=slots.view(batch, rows)[is_kept],
        sources=is_kept.flatten().nonzero().flatten(),
        places=places.flatten(),
        kept=tokens.masked_fill(~is_kept, -1),
    )
