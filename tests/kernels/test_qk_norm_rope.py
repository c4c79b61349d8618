"""Norm and rotation of a merged projection against the twin, and the twin against the core."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_plugin.kernels.common import NormRope
from dflash_plugin.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_naive
from tests.helpers.core_rotation import CHANGES, CORE_BOUND, IDS, rotated_by_the_core
from tests.helpers.kernel_helpers import (
    BOUND,
    DTYPES,
    EPS,
    NoLaunch,
    error,
    frequencies,
    positions_of,
    random,
    rotations,
    tiles_of,
)

pytestmark = pytest.mark.usefixtures("kernel_device")


@settings(max_examples=80, deadline=None)
@given(
    case=rotations(),
    heads=st.sampled_from([3, 9]),
    padding=st.sampled_from([0, 13]),
    each=st.sampled_from([1, 2, 9]),
)
def test_qk_norm_rope(case: dict[str, Any], heads: int, padding: int, each: int) -> None:
    rows, kv_heads, head_dim = case["rows"], case["kv_heads"], case["head_dim"]
    width = (heads + 2 * kv_heads) * head_dim
    memory = random(rows, width + padding, dtype=case["dtype"])
    twin_memory = memory.clone()
    weights = tuple(1 + 0.2 * random(head_dim, padding=i).to(case["dtype"]) for i in (0, 1))
    for op, qkv in ((qk_norm_rope, memory), (qk_norm_rope_naive, twin_memory)):
        with mock.patch("dflash_plugin.kernels.qk_norm_rope.tiles_each", tiles_of(each)):
            op(
                qkv[:, :width],
                positions_of(rows),
                weights if case["norm"] else None,
                case["how"],
                heads,
                kv_heads,
                value_scale=case["value_scale"],
            )
    assert error(memory, twin_memory) < BOUND[case["dtype"]]
    assert torch.equal(memory[:, width:], twin_memory[:, width:])
    if case["value_scale"] is None:
        of_values = slice((heads + kv_heads) * head_dim, width)
        assert torch.equal(memory[:, of_values], twin_memory[:, of_values])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", CHANGES, ids=IDS)
def test_the_twin_is_the_cores(changes: dict[str, Any], dtype: torch.dtype) -> None:
    core = rotated_by_the_core(changes, dtype)
    qkv = core.qkv.clone()
    qk_norm_rope_naive(
        qkv, core.positions, core.weights, core.how, 9, 3, value_scale=core.value_scale
    )
    parts = qkv.unflatten(-1, (15, 24)).split([9, 3, 3], dim=1)
    for part, expected in zip(parts[:2], (core.query, core.key), strict=True):
        assert error(part, expected) < CORE_BOUND[dtype]
    assert torch.equal(parts[2], core.value)


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_plugin.kernels.qk_norm_rope._kernel", NoLaunch())
    none, weight = torch.zeros(0, dtype=torch.int64), torch.ones(24)
    qk_norm_rope(torch.zeros(0, 72), none, (weight, weight), NormRope(frequencies(24), EPS), 1, 1)


def test_faulty_arguments() -> None:
    weight, rows, qkv = torch.ones(24), torch.arange(2), torch.zeros(2, 72)
    cases: list[tuple[Tensor, Tensor, Tensor, int, str]] = [
        (torch.zeros(2, 71), rows, weight, 24, "qkv"),
        (torch.zeros(72, 2).T, rows, weight, 24, "qkv"),
        (qkv, rows, torch.ones(23), 24, "norm weights must"),
        (qkv, rows.int(), weight, 24, "positions must be int64"),
        (qkv, rows, weight, 26, "13 inverse frequencies do not fit head_dim 24"),
    ]
    for qkv, positions, key_weight, rotary_dim, message in cases:
        how = NormRope(frequencies(rotary_dim), EPS)
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(qkv, positions, (weight, key_weight), how, 1, 1)
