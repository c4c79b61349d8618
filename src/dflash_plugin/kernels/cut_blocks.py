"""The verify batch compacted to the rows that are verified, one request after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.language import tl, triton


class CutBlocks(NamedTuple):
    """The N verified rows of B blocks of T rows; rows of padding behind them hold zeros.

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


@triton.jit(do_not_specialize=["rows"])
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
    rows,
    tokens_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.arange(0, BLOCK)
    begin = tl.load(starts + request)
    count = tl.load(starts + request + 1) - begin
    is_row = row < ROWS
    is_kept = is_row & (row < count)
    tl.store(requests + begin + row, request + row * 0, mask=is_kept)
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
    if request == tl.num_programs(0) - 1:
        for start in range(begin + count, rows, BLOCK):
            at = start + row
            is_padding = at < rows
            tl.store(requests + at, request + row * 0, mask=is_padding)
            tl.store(tokens_out + at, 0, mask=is_padding)
            tl.store(positions_out + at, 0, mask=is_padding)
            tl.store(slots_out + at, 0, mask=is_padding)
            tl.store(sources_out + at, 0, mask=is_padding)


@with_twin
def cut_blocks(
    tokens: Tensor, positions: Tensor, slots: Tensor, rows: int, starts: Tensor, requests: Tensor
) -> CutBlocks:
    """Compact B blocks to the rows that are verified, in one launch.

    Args:
        tokens: int64 [B, T], last dimension contiguous.
        positions: int32 or int64 [B * T], contiguous.
        slots: int32 or int64 [B * T], contiguous, where keys and values are written.
        rows: N, rows of the pass, at least B.
        starts: int32 [at least B + 1], the first verified row of each block, and the end of the
            last, which is at most ``rows``: what is left is padding.
        requests: int32 [at least ``rows``], output: the block of each row; of padding the last.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, block = _check(tokens, positions, slots, rows, starts, requests)
    made = _empty(tokens, positions, slots, rows)
    if batch:
        _kernel[(batch,)](
            tokens,
            positions,
            slots,
            starts,
            requests,
            *made,
            rows,
            tokens.stride(0),
            ROWS=block,
            BLOCK=triton.next_power_of_2(block),
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
    tokens: Tensor, positions: Tensor, slots: Tensor, rows: int, starts: Tensor, requests: Tensor
) -> tuple[int, int]:
    batch, block = tokens.shape
    if tokens.dtype != torch.int64 or tokens.stride(1) != 1:
        raise ValueError("tokens must be int64 [B, T] with contiguous rows")
    if rows < batch:
        raise ValueError(f"rows is {rows}: give {batch} or more")
    for name, part in (("positions", positions), ("slots", slots)):
        if part.shape != (batch * block,) or not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{batch * block}]")
    for name, part, min_size in (("starts", starts, batch + 1), ("requests", requests, rows)):
        if part.dim() != 1 or part.shape[0] < min_size or part.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{min_size}] or longer")
    return batch, block


def cut_blocks_naive(
    tokens: Tensor, positions: Tensor, slots: Tensor, rows: int, starts: Tensor, requests: Tensor
) -> CutBlocks:
    """``cut_blocks`` in plain torch; reads back to the host."""
    batch, block = _check(tokens, positions, slots, rows, starts, requests)
    counts = starts[: batch + 1].diff()
    owners = torch.arange(batch, dtype=torch.int32, device=starts.device)
    verified = int(counts.sum())
    requests[:verified] = owners.repeat_interleave(counts)
    requests[verified:rows] = batch - 1
    row = torch.arange(block, device=tokens.device)
    is_kept = row < counts[:, None]
    indices = starts[:batch, None].long() + torch.minimum(row, counts[:, None].long() - 1)

    def padded(part: Tensor) -> Tensor:
        return torch.cat([part, part.new_zeros(rows - verified)])

    return CutBlocks(
        tokens=padded(tokens[is_kept]),
        positions=padded(positions.view(batch, block)[is_kept]),
        slots=padded(slots.view(batch, block)[is_kept]),
        sources=padded(is_kept.flatten().nonzero().flatten()),
        indices=indices.flatten(),
        kept=tokens.masked_fill(~is_kept, -1),
    )
