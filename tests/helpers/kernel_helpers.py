"""What the kernels' tests share: where they run, made-up values and the error of a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter
from hypothesis import strategies as st
from torch import Tensor

from dflash_plugin.kernels.common import NormRope
from dflash_plugin.kernels.fp8_rows import RoundedRows

# Compiled on a GPU, interpreted elsewhere (see conftest.py).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A rounding step left out shows above these.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2.5e-4}
DTYPES = list(BOUND)
EPS = 1e-6


def error(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖."""
    assert out.shape == reference.shape
    assert out.dtype == reference.dtype
    if out.numel() == 0:
        return 0.0
    difference = (out.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def values(rows: Tensor | RoundedRows) -> Tensor:
    """Rows as they are multiplied."""
    return rows if isinstance(rows, Tensor) else rows.values.float() * rows.scales[:, None]


def random(
    *shape: int, dtype: torch.dtype = torch.float32, padding: int = 0, seed: int = 0
) -> Tensor:
    """Normal values; ``padding`` more in each row of the memory underneath."""
    generator = torch.Generator().manual_seed(sum(shape) + padding + 1000 * seed)
    whole = (*shape[:-1], shape[-1] + padding)
    values = torch.randn(whole, generator=generator, device="cpu")
    return values.to(DEVICE, dtype)[..., : shape[-1]]


def frequencies(rotary_dim: int) -> Tensor:
    """Inverse frequencies, float32 [rotary_dim / 2]."""
    return 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)


def positions_of(rows: int) -> Tensor:
    """int64 [rows], below a million."""
    return integers(0, 1_000_000, rows)


@st.composite
def rotations(draw: st.DrawFn) -> dict[str, Any]:
    """What ``qk_norm_rope`` and ``inject_kv`` have in common."""
    dtype = draw(st.sampled_from(DTYPES))
    head_dim = draw(st.sampled_from([24, 64, 128]))
    rotary_dim = draw(st.sampled_from([head_dim, head_dim // 2, head_dim // 4]))
    return {
        "rows": draw(st.sampled_from([0, 1, 5, 17])),
        "kv_heads": draw(st.sampled_from([1, 3])),
        "head_dim": head_dim,
        "dtype": dtype,
        "norm": draw(st.booleans()),
        "how": NormRope(
            frequencies(rotary_dim),
            EPS,
            gemma=draw(st.booleans()),
            interleaved=draw(st.booleans()),
            factor=draw(st.sampled_from([1.0, 1.25])),
        ),
        "value_scale": draw(st.sampled_from([None, 0.7])),
    }


def tiles_of(each: int) -> Callable[[int, int], int]:
    """In place of ``tiles_each``, which gives a program several tiles only with many rows."""
    return lambda rows, tiles: min(each, tiles)


class NoLaunch:
    """Stands in for a kernel that must not run."""

    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError(f"launched over {grid}")


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """int64 values from ``low`` to below ``high``."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(DEVICE)


_convert_float = triton.runtime.interpreter._convert_float


def rounded(data: Any, source: tl.dtype, target: tl.dtype, mode: Any) -> Any:
    """The interpreter truncates float32 where a GPU rounds to nearest even."""
    narrow = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    if source != tl.float32 or target not in narrow:
        return _convert_float(data, source, target, mode)
    array = torch.from_numpy(np.array(data, dtype=np.float32)).to(narrow[target])
    bits = np.dtype(f"u{array.itemsize}")
    return array.view(torch.uint8).numpy().view(bits).reshape(array.shape)
