"""The rows of all requests' blocks, made on the device from the anchors alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class BlockInputs(NamedTuple):
    """Rows of B blocks; those of requests that do not run have slot -1.

    Attributes:
        tokens: int64 [B, block], the anchor, then masks.
        positions: int64 [B, block].
        slots: int64 [B, block], where the rows' keys and values go.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor


@triton.jit
def _kernel(
    anchors,
    anchor_positions,
    page_table,
    requests,
    running,
    tokens,
    positions,
    slots,
    mask_token,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK)
    inside = row < BLOCK_SIZE
    count = request + 1
    if running is not None:
        count = tl.load(running).to(tl.int64)
    out = request * BLOCK_SIZE + row
    if request < count:
        table_row = request
        if requests is not None:
            table_row = tl.load(requests + request).to(tl.int64)
        anchor = tl.load(anchors + request)
        position = tl.load(anchor_positions + request) + row
        page_at = page_table + table_row * table_stride + position // PAGE_SIZE
        page = tl.load(page_at, mask=inside, other=0).to(tl.int64)
        slot = page * PAGE_SIZE + position % PAGE_SIZE
        tl.store(tokens + out, tl.where(row == 0, anchor, mask_token), mask=inside)
        tl.store(positions + out, position, mask=inside)
        tl.store(slots + out, slot, mask=inside)
    else:
        tl.store(tokens + out, row * 0 + mask_token, mask=inside)
        tl.store(positions + out, row, mask=inside)
        tl.store(slots + out, row * 0 - 1, mask=inside)


def block_inputs(
    anchors: Tensor,
    anchor_positions: Tensor,
    page_table: Tensor,
    block_size: int,
    mask_token: int,
    *,
    page_size: int = 1,
    requests: Tensor | None = None,
    running: Tensor | None = None,
    out: BlockInputs | None = None,
) -> BlockInputs:
    """Tokens, positions and cache slots of every row of B blocks, in one launch.

    Args:
        anchors: int64 [B].
        anchor_positions: int64 [B].
        page_table: int32 or int64 [R, pages], the pages of each request in order of position; with
            pages of one slot, its slots. It reaches at least to the end of the block.
        block_size: rows of a block, the anchor's included.
        mask_token: id of the others.
        page_size: slots of a page.
        requests: int64 [B], rows of ``page_table``, or None for the first B.
        running: int32 [1]; requests from this one on are padding, and nothing of theirs is read.
            None runs all.
        out: where to write, for a captured graph; or None.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch = _check(anchors, anchor_positions, page_table, block_size, page_size, requests)
    made = out or BlockInputs(
        *(
            torch.empty(batch, block_size, dtype=torch.int64, device=anchors.device)
            for _ in BlockInputs._fields
        )
    )
    if any(part.shape != (batch, block_size) or not part.is_contiguous() for part in made):
        raise ValueError(f"out must be contiguous [{batch}, {block_size}]")
    if batch > 0:
        _kernel[(batch,)](
            anchors,
            anchor_positions,
            page_table,
            requests,
            running,
            *made,
            mask_token,
            page_table.stride(0),
            BLOCK_SIZE=block_size,
            PAGE_SIZE=page_size,
            BLOCK=triton.next_power_of_2(block_size),
            num_warps=1,
        )
    return made


def _check(
    anchors: Tensor,
    anchor_positions: Tensor,
    page_table: Tensor,
    block_size: int,
    page_size: int,
    requests: Tensor | None,
) -> int:
    batch = anchors.shape[0]
    for name, part in (("anchors", anchors), ("anchor_positions", anchor_positions)):
        if part.shape != (batch,) or part.dtype != torch.int64 or not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64 [{batch}]")
    if page_table.dim() != 2 or page_table.stride(1) != 1:
        raise ValueError("page_table must be [R, pages] with contiguous rows")
    if requests is not None and (requests.shape != (batch,) or not requests.is_contiguous()):
        raise ValueError(f"requests must be contiguous [{batch}]")
    if block_size < 1 or page_size < 1:
        raise ValueError(f"block_size is {block_size} and page_size {page_size}: give 1 or more")
    return batch


def block_inputs_naive(
    anchors: Tensor,
    anchor_positions: Tensor,
    page_table: Tensor,
    block_size: int,
    mask_token: int,
    *,
    page_size: int = 1,
    requests: Tensor | None = None,
    running: Tensor | None = None,
    out: BlockInputs | None = None,
) -> BlockInputs:
    """``block_inputs`` in plain torch; reads ``running`` back to the host."""
    batch = _check(anchors, anchor_positions, page_table, block_size, page_size, requests)
    count = batch if running is None else min(batch, int(running))
    index = torch.arange(batch, device=anchors.device) if requests is None else requests.long()
    rows = torch.arange(block_size, device=anchors.device)
    tokens = torch.full((batch, block_size), mask_token, device=anchors.device)
    tokens[:count, 0] = anchors[:count]
    positions = torch.zeros_like(tokens) + rows
    positions[:count] += anchor_positions[:count, None]
    slots = torch.full_like(tokens, -1)
    pages = page_table[index[:count, None], positions[:count] // page_size].long()
    slots[:count] = pages * page_size + positions[:count] % page_size
    made = BlockInputs(tokens, positions, slots)
    if out is None:
        return made
    for target, source in zip(out, made, strict=True):
        target.copy_(source)
    return out
