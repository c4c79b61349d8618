"""KV injection into paged pools against the twin, and the twin against the core."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_plugin.kernels.common import NormRope
from dflash_plugin.kernels.inject_kv import KVPools, inject_kv, inject_kv_naive
from tests.helpers.core_rotation import CHANGES, CORE_BOUND, IDS, rotated_by_the_core
from tests.helpers.kernel_helpers import (
    BOUND,
    DEVICE,
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
POISON = -77.0


def make_pools(
    layers: int, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, merged: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Poisoned pools of their own, or views of one tensor with a wider slot stride."""
    shape = (slots, kv_heads, head_dim)
    if merged:
        whole = torch.full((layers, slots, 2, kv_heads, head_dim), POISON, dtype=dtype)
        return list(whole[:, :, 0]), list(whole[:, :, 1])
    keys, values = ([torch.full(shape, POISON, dtype=dtype) for _ in range(layers)] for _ in "kv")
    return keys, values


@settings(max_examples=80, deadline=None)
@given(
    case=rotations(),
    layers=st.sampled_from([1, 3]),
    pool_dtype=st.sampled_from([*DTYPES, torch.float8_e4m3fn]),
    merged=st.booleans(),
    scaled=st.booleans(),
    committed=st.sampled_from(["none", "some", "all", None]),
    each=st.sampled_from([1, 2, 9]),
)
def test_inject_kv(
    case: dict[str, Any],
    layers: int,
    pool_dtype: torch.dtype,
    merged: bool,
    scaled: bool,
    committed: str | None,
    each: int,
) -> None:
    kv_heads, head_dim = case["kv_heads"], case["head_dim"]
    per_request = case["rows"]
    requests = 2 if committed and per_request < 10 else 1
    rows = requests * per_request
    generator = torch.Generator().manual_seed(rows)
    slots = torch.randperm(rows + 9, generator=generator, device="cpu")[:rows].to(DEVICE)
    slots[2::4] = -1
    kept = {"none": 0, "some": per_request // 2, "all": per_request, None: per_request}[committed]
    kv = random(rows, layers, 2, kv_heads, head_dim, dtype=case["dtype"])
    weights = 1 + 0.2 * random(layers, head_dim).to(case["dtype"])
    options: dict[str, Any] = {"value_scale": case["value_scale"]}
    if committed is not None:
        options["committed"] = torch.full((requests,), kept, dtype=torch.int32)
        options["committed"][1:] = per_request
    written = torch.zeros(rows + 9, dtype=torch.bool)
    for row, slot in enumerate(slots.tolist()):
        limit = kept if row < per_request else per_request
        if slot >= 0 and row % per_request < limit:
            written[slot] = True

    # FP8's largest value is 448: the last of these pass it.
    scales = [(0.5, 0.25), (2.0, 1.0), (0.002, 0.001)]
    results = []
    for op in (inject_kv, inject_kv_naive):
        pools = make_pools(layers, rows + 9, kv_heads, head_dim, pool_dtype, merged)
        with mock.patch("dflash_plugin.kernels.inject_kv.tiles_each", tiles_of(each)):
            op(
                kv,
                positions_of(rows),
                slots,
                KVPools.build(*pools, scales[:layers] if scaled else None),
                weights if case["norm"] else None,
                case["how"],
                **options,
            )
        results.append(torch.stack([torch.stack(one) for one in pools]).float())
    out, reference = results
    poison = float(torch.tensor(POISON).to(pool_dtype))
    for result in results:
        assert (result[:, :, ~written] == poison).all()
        # A value may happen to be rounded to it.
        assert (result[:, :, written] != poison).any(dim=-1).all()
    # FP8 keeps four bits: a value at the edge is rounded either way.
    bound = max(BOUND[case["dtype"]], BOUND.get(pool_dtype, 1e-2))
    assert error(out[:, :, written], reference[:, :, written]) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", CHANGES, ids=IDS)
def test_the_twin_is_the_cores(changes: dict[str, Any], dtype: torch.dtype) -> None:
    core = rotated_by_the_core(changes, dtype)
    pools = make_pools(1, 17, 3, 24, dtype, merged=False)
    inject_kv_naive(
        core.qkv[:, 9 * 24 :].reshape(17, 1, 2, 3, 24),
        core.positions,
        torch.arange(17),
        KVPools.build(*pools),
        None if core.weights is None else core.weights[1][None],
        core.how,
        value_scale=core.value_scale,
    )
    assert error(pools[0][0], core.key) < CORE_BOUND[dtype]
    assert torch.equal(pools[1][0], core.value)


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_plugin.kernels.inject_kv._kernel", NoLaunch())
    none, weights = torch.zeros(0, dtype=torch.int64), torch.ones(1, 24)
    pools = KVPools.build(*make_pools(1, 3, 1, 24, torch.float32, False))
    how = NormRope(frequencies(24), EPS)
    for committed in (None, torch.zeros(0, dtype=torch.int32)):
        kv = torch.zeros(0, 1, 2, 1, 24)
        inject_kv(kv, none, none, pools, weights, how, committed=committed)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ([], [], "0 key pools"),
        ([torch.zeros(4, 2, 8)], [], "1 key pools and 0 value pools"),
        ([torch.zeros(4, 2, 8).double()], [torch.zeros(4, 2, 8)], "key pool of layer 0: dtype"),
        ([torch.zeros(4, 2, 8)], [torch.zeros(4, 2, 9)], "value pool of layer 0: shape"),
        ([torch.zeros(4, 2, 8)], [torch.zeros(4, 2, 8).half()], "value pool of layer 0: .*float16"),
        ([torch.zeros(4, 2, 9)[..., :8]], [torch.zeros(4, 2, 8)], "heads are not contiguous"),
        (
            [torch.zeros(4, 2, 8), torch.zeros(4, 4, 8)[:, :2]],
            [torch.zeros(4, 2, 8)] * 2,
            "key pool of layer 1: slot stride 32, but layer 0 has 16",
        ),
    ],
)
def test_faulty_pools(key: list[Tensor], value: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVPools.build(key, value)


def test_faulty_arguments() -> None:
    pools = KVPools.build(*make_pools(1, 3, 1, 24, torch.float32, False))
    kv, rows, weights = torch.zeros(2, 1, 2, 1, 24), torch.arange(2), torch.ones(1, 24)
    three = torch.ones(3, dtype=torch.int32)
    cases: list[tuple[Tensor, Tensor, Tensor | None, Tensor, str]] = [
        (kv[:, :, :1], rows, None, weights, "kv must be"),
        (kv, rows.int(), None, weights, "slots"),
        (kv, rows, None, weights[0], "key_weights"),
        (kv, rows, torch.ones(2), weights, "committed must be int32"),
        (kv, rows, three, weights, "2 rows are no multiple of 3"),
    ]
    how = NormRope(frequencies(24), EPS)
    for kv, slots, committed, key_weights, message in cases:
        with pytest.raises(ValueError, match=message):
            inject_kv(kv, rows, slots, pools, key_weights, how, committed=committed)
