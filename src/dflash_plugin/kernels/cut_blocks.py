"""The verify batch compacted to the rows that are verified, one request after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.language import tl, triton


class CutBlocks(NamedTuple):
    """The N verified rows of B blocks of T rows.

    Attributes:
        tokens: int64 [N].
        positions: [N], in the dtype of the input's.
        slots: [N], in the dtype of the input's.
        sources: int64 [N], the row of the whole blocks [B * T] that each was.
        indices: int64 [B * T], the verified row of each row of the whole blocks; a row that is cut
            has the last verified row of its block.
        kept: int64 [B, T], the tokens, with -1 where a row is cut.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    sources: Tensor
    indices: Tensor
    kept: Tensor


@triton.jit(do_not_specialize=["batch", "given", "verify_length"])
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
    indices_out,
    kept_out,
    batch,
    given,
    verify_length,
    tokens_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.arange(0, BLOCK)
    # Requests that pad a captured pass have ``verify_length`` rows each.
    side = tl.arange(0, 2)
    bound = request + side
    is_given = bound < given + side
    bounds = tl.load(starts + bound, mask=is_given, other=bound * verify_length)
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
    index = begin + tl.minimum(row, count - 1)
    tl.store(indices_out + source, index.to(tl.int64), mask=is_row)


@with_twin
def cut_blocks(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    verify_length: int,
    starts: Tensor,
    requests: Tensor,
    *,
    even: bool,
) -> CutBlocks:
    """Compact B blocks to the rows that are verified, in one launch.

    Args:
        tokens: int64 [B, T], last dimension contiguous.
        positions: int32 or int64 [B * T], contiguous.
        slots: int32 or int64 [B * T], contiguous, where keys and values are written.
        verify_length: verified rows of a block on average, from 1 to T.
        starts: int32 [at least B + 1], the first verified row of each block; entry B is
            ``B * verify_length``. The entries of requests beyond the batch are filled in, and with
            ``even`` all entries.
        requests: int32 [at least (size of ``starts`` - 1) * verify_length], output: the request of
            each row.
        even: every block keeps its first ``verify_length`` rows.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, rows = _check(tokens, positions, slots, verify_length, starts, requests)
    made = _empty(tokens, positions, slots, batch * verify_length)
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
        verify_length,
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
        indices=tokens.new_empty(tokens.numel()),
        kept=tokens.new_empty(tokens.shape),
    )


def _check(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    verify_length: int,
    starts: Tensor,
    requests: Tensor,
) -> tuple[int, int]:
    batch, rows = tokens.shape
    if tokens.dtype != torch.int64 or tokens.stride(1) != 1:
        raise ValueError("tokens must be int64 [B, T] with contiguous rows")
    if not 1 <= verify_length <= rows:
        raise ValueError(f"verify_length is {verify_length}: give 1 to {rows}")
    for name, part in (("positions", positions), ("slots", slots)):
        if part.shape != (batch * rows,) or not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{batch * rows}]")
    capacity = starts.shape[0] - 1
    for name, part, min_size in (
        ("starts", starts, batch + 1),
        ("requests", requests, capacity * verify_length),
    ):
        if part.dim() != 1 or part.shape[0] < min_size or part.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{min_size}] or longer")
    return batch, rows


def cut_blocks_naive(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    verify_length: int,
    starts: Tensor,
    requests: Tensor,
    *,
    even: bool,
) -> CutBlocks:
    """``cut_blocks`` in plain torch; reads back to the host."""
    batch, rows = _check(tokens, positions, slots, verify_length, starts, requests)
    capacity = starts.shape[0] - 1
    shares = torch.arange(capacity + 1, dtype=torch.int32, device=starts.device) * verify_length
    if even:
        starts.copy_(shares)
    starts[batch + 1 :] = shares[batch + 1 :]
    counts = starts.diff()
    owners = torch.arange(capacity, dtype=torch.int32, device=starts.device)
    requests[: capacity * verify_length] = owners.repeat_interleave(counts)
    row = torch.arange(rows, device=tokens.device)
    is_kept = row < counts[:batch, None]
    indices = starts[:batch, None].long() + torch.minimum(row, counts[:batch, None].long() - 1)
    return CutBlocks(
        tokens=tokens[is_kept],
        positions=positions.view(batch, rows)[is_kept],
        slots=slots.view(batch, rows)[is_kept],
        sources=is_kept.flatten().nonzero().flatten(),
        indices=indices.flatten(),
        kept=tokens.masked_fill(~is_kept, -1),
    )
