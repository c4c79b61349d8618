"""Weights of quantised layouts as float32 matrices, in plain torch.

Every function takes tensors on the meta device too, for their shapes. Layouts: compressed-tensors
(PyPI compressed-tensors, ``compressors``) and ModelOpt (PyPI nvidia-modelopt, ``export``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The values of FP4 (e2m1) by their four bits; the highest bit is the sign.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_GROUP = 16


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Signed integers float32 [rows, columns] of unsigned ones packed from the lowest bits up.

    Args:
        packed: int32 [rows, ceil(columns / (32 // bits))]; an integer holds its value plus half of
            its range, and the last one may be padded.
        bits: of an integer.
        columns: integers in a row.
    """
    shifts = torch.arange(32 // bits, dtype=torch.int32, device=packed.device) * bits
    values = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return (values.flatten(-2)[:, :columns] - (1 << (bits - 1))).float()


def unpack_fp4(packed: Tensor) -> Tensor:
    """FP4 values float32 [rows, 2 * n] of uint8 [rows, n], the lower four bits first."""
    signed = (*FP4_VALUES, *(-value for value in FP4_VALUES))
    values = torch.tensor(signed, device=packed.device)
    return values[torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).int()]


def spread(
    scale: Tensor, shape: tuple[int, int], block: tuple[int, int], part_rows: Sequence[int]
) -> Tensor | None:
    """A scale or a zero point as float32 that broadcasts to a weight, or None if it does not fit.

    Args:
        scale: one number; one for each row, [rows] or [rows, 1]; one for each block,
            [ceil(rows / block[0]), ceil(columns / block[1])] or the same with ones between, as
            ModelOpt writes it; one for each group of a row, [rows, groups]; or one for each part of
            a fused weight, [parts].
        shape: rows and columns of the weight.
        block: rows and columns of a block.
        part_rows: rows of each part of a fused weight.
    """
    rows, columns = shape
    scale = scale.float()
    if scale.dim() == 4 and scale.shape[1] == scale.shape[3] == 1:
        scale = scale[:, 0, :, 0]
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if not scale.numel():
        return None
    if scale.shape in ((rows,), (rows, 1)):
        return scale.reshape(rows, 1)
    if scale.shape == (len(part_rows),):
        parts = zip(scale, part_rows, strict=True)
        return torch.cat([one.expand(count) for one, count in parts])[:, None]
    if scale.dim() != 2:
        return None
    if scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
        by_row = scale.repeat_interleave(block[0], dim=0)[:rows]
        return by_row.repeat_interleave(block[1], dim=1)[:, :columns]
    groups = scale.shape[1]
    if scale.shape[0] == rows and groups and columns % groups == 0:
        return scale.repeat_interleave(columns // groups, dim=1)
    return None
