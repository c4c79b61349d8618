"""The drafter's elementwise kernels against their twins, and the twins against the core."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin import kernels
from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors, Stream, uniforms
from dflash_plugin.drafter.config import ConvolutionConfig, RopeConfig
from dflash_plugin.drafter.fp8_linear import quantize_drafter
from dflash_plugin.drafter.layers import DraftAttention, RMSNorm, TorchLayers
from dflash_plugin.drafter.rope import RotaryEmbedding
from dflash_plugin.kernels.best_logits import best_logits
from dflash_plugin.kernels.draft_head import draft_head
from dflash_plugin.kernels.fp8_rows import takes_rounded
from dflash_plugin.serving.draft_tokens import Candidates, select_drafts
from tests.helpers.kernel_helpers import BOUND, DEVICE, DTYPES, error, integers, random
from tests.helpers.tiny import DFLASH2, tiny_config, tiny_drafter, tiny_target

OPS = ("add_rms_norm", "gated_act", "inject_kv", "qk_norm_rope", "quantize_rows")
# The core rounds cosines, sines and products too.
CORE_BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
EPS = 1e-6
POISON = -77.0
ops = SimpleNamespace(
    **{
        name: importlib.import_module(f"{kernels.__name__}.{name}")
        for name in (*OPS, "fused_block")
    }
)


pytestmark = pytest.mark.usefixtures("kernel_device")


class NoLaunch:
    """Stands in for a kernel that must not run."""

    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError(f"launched over {grid}")


def frequencies(rotary_dim: int) -> Tensor:
    return 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)


def positions_of(rows: int) -> Tensor:
    return integers(0, 1_000_000, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [123, 576, 1024])
@pytest.mark.parametrize("rows", [0, 1, 5, 17])
@pytest.mark.parametrize(("residual", "gemma"), [(True, False), (False, True), (True, True)])
def test_add_rms_norm(
    rows: int, width: int, dtype: torch.dtype, residual: bool, gemma: bool
) -> None:
    x = random(rows, width, dtype=dtype, padding=5)
    other = random(rows, width, dtype=dtype, padding=11) if residual else None
    weight = 1 + 0.2 * random(width).to(dtype)
    normed, total = ops.add_rms_norm.add_rms_norm(x, other, weight, EPS, gemma)
    twin_normed, twin_total = ops.add_rms_norm.add_rms_norm_naive(x, other, weight, EPS, gemma)
    assert torch.equal(total, twin_total)
    assert error(normed, twin_normed) < BOUND[dtype]
    assert (total is x) == (other is None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("op", ["norm", "plain norm", "act"])
def test_rows_are_rounded_where_they_are_made(op: str, rows: int, dtype: torch.dtype) -> None:
    """As they are by a launch of their own, but for values that fall to the neighbor."""
    x = 4 * random(rows, 246, dtype=dtype, padding=5)
    if op == "act":
        given, twin = (f(x, rounds=True) for f in (
            ops.gated_act.gated_act, ops.gated_act.gated_act_naive))  # fmt: skip
        plain = ops.gated_act.gated_act(x)
    else:
        other = random(rows, 246, dtype=dtype, padding=11) if op == "norm" else None
        arguments = (x, other, 1 + 0.2 * random(246).to(dtype), EPS)
        (given, total), (twin, _) = (f(*arguments, rounds=True) for f in (
            ops.add_rms_norm.add_rms_norm, ops.add_rms_norm.add_rms_norm_naive))  # fmt: skip
        plain, expected = ops.add_rms_norm.add_rms_norm(*arguments)
        assert torch.equal(total, expected)
    separately = ops.quantize_rows.quantize_rows(plain)
    assert torch.equal(given.values.float(), separately.values.float())
    assert torch.equal(given.scales, separately.scales)
    assert given.dtype == twin.dtype == dtype
    wide = [one.values.float() * one.scales[:, None] for one in (given, twin)]
    assert error(*wide) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemma", [False, True])
def test_add_rms_norm_is_the_cores(dtype: torch.dtype, gemma: bool) -> None:
    norm = RMSNorm(123, EPS, gemma).to(dtype)
    with torch.no_grad():
        norm.weight.add_(0.2 * random(123).to(dtype))
    x, residual = random(5, 123, dtype=dtype), random(5, 123, dtype=dtype, padding=3)
    normed, total = ops.add_rms_norm.add_rms_norm_naive(x, residual, norm.weight, EPS, gemma)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm(x + residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 123, 1024, 1500])
@pytest.mark.parametrize("rows", [0, 1, 5, 17])
def test_gated_act(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = 4 * random(rows, 2 * width, dtype=dtype, padding=3)
    out = ops.gated_act.gated_act(gate_up)
    assert error(out, ops.gated_act.gated_act_naive(gate_up)) < BOUND[dtype]
    gate, up = gate_up[:, :width], gate_up[:, width:]
    assert torch.equal(ops.gated_act.gated_act_naive(gate_up), F.silu(gate) * up)


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
        "inverse_frequencies": frequencies(rotary_dim),
        "options": {
            "gemma": draw(st.booleans()),
            "interleaved": draw(st.booleans()),
            "factor": draw(st.sampled_from([1.0, 1.25])),
            "value_scale": draw(st.sampled_from([None, 0.7])),
        },
    }


def tiles_of(each: int) -> Callable[[int, int], int]:
    """In place of ``tiles_each``, which gives a program several tiles only with many rows."""
    return lambda rows, tiles: min(each, tiles)


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
    weights = [1 + 0.2 * random(head_dim, padding=i).to(case["dtype"]) for i in (0, 1)]
    for op, qkv in (("qk_norm_rope", memory), ("qk_norm_rope_naive", twin_memory)):
        with mock.patch.object(ops.qk_norm_rope, "tiles_each", tiles_of(each)):
            getattr(ops.qk_norm_rope, op)(
                qkv[:, :width],
                positions_of(rows),
                *(weights if case["norm"] else (None, None)),
                case["inverse_frequencies"],
                heads,
                kv_heads,
                head_dim,
                EPS,
                **case["options"],
            )
    assert error(memory, twin_memory) < BOUND[case["dtype"]]
    assert torch.equal(memory[:, width:], twin_memory[:, width:])
    if case["options"]["value_scale"] is None:
        values = slice((heads + kv_heads) * head_dim, width)
        assert torch.equal(memory[:, values], twin_memory[:, values])


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
    options = dict(case["options"])
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
    for op in ("inject_kv", "inject_kv_naive"):
        pools = make_pools(layers, rows + 9, kv_heads, head_dim, pool_dtype, merged)
        with mock.patch.object(ops.inject_kv, "tiles_each", tiles_of(each)):
            getattr(ops.inject_kv, op)(
                kv,
                positions_of(rows),
                slots,
                ops.inject_kv.KVPools.build(*pools, scales[:layers] if scaled else None),
                weights if case["norm"] else None,
                case["inverse_frequencies"],
                EPS,
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
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_style": "gemma", "attention_value_scale": 0.7},
        {"qk_norm": False, "rope": RopeConfig(interleaved=True)},
        {"rope": RopeConfig(partial_rotary_factor=0.5)},
        {
            "rope": RopeConfig(
                type="yarn",
                parameters={"factor": 4.0, "original_max_position_embeddings": 8192},
                interleaved=True,
            )
        },
    ],
    ids=["plain", "gemma", "interleaved", "partial", "yarn"],
)
def test_rotation_is_the_cores(changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = tiny_config(num_attention_heads=9, num_key_value_heads=3, head_dim=24, **changes)
    attention = DraftAttention(config, 0, TorchLayers()).to(dtype)
    rotary = RotaryEmbedding(config).to(DEVICE)
    if config.qk_norm:
        with torch.no_grad():
            attention.query_norm.weight.add_(0.2 * random(24).to(dtype))
            attention.key_norm.weight.add_(0.3 * random(24).to(dtype))
    norms = (attention.query_norm, attention.key_norm)
    weights = [norm.weight.detach() if config.qk_norm else None for norm in norms]
    options = {
        "gemma": config.norm_style == "gemma",
        "interleaved": rotary.interleaved,
        "factor": rotary.factor,
        "value_scale": config.attention_value_scale,
    }
    positions, qkv = positions_of(17), random(17, 15 * 24, dtype=dtype)
    tables = rotary.tables(positions, dtype)
    query, kv = qkv.split([9 * 24, 6 * 24], dim=-1)
    with torch.no_grad():
        query = rotary.rotate(attention.query_norm(query.unflatten(-1, (9, 24))), tables)
        key, value = attention._finish(kv, rotary, tables)

    pools = make_pools(1, 17, 3, 24, dtype, merged=False)
    ops.inject_kv.inject_kv_naive(
        kv.reshape(17, 1, 2, 3, 24),
        positions,
        torch.arange(17),
        ops.inject_kv.KVPools.build(*pools),
        weights[1][None] if config.qk_norm else None,
        rotary.inverse_frequencies,
        config.rms_norm_eps,
        **options,
    )
    assert error(pools[0][0], key) < CORE_BOUND[dtype]
    assert torch.equal(pools[1][0], value)

    finished = qkv.clone()
    ops.qk_norm_rope.qk_norm_rope_naive(
        finished,
        positions,
        *weights,
        rotary.inverse_frequencies,
        9,
        3,
        24,
        config.rms_norm_eps,
        **options,
    )
    parts = finished.unflatten(-1, (15, 24)).split([9, 3, 3], dim=1)
    assert error(parts[0], query) < CORE_BOUND[dtype]
    assert torch.equal(parts[1], pools[0][0])
    assert torch.equal(parts[2], value)


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPS:
        monkeypatch.setattr(getattr(ops, name), "_kernel", NoLaunch())
    empty, weight, none = torch.zeros(0, 24), torch.ones(24), torch.zeros(0, dtype=torch.int64)
    ops.add_rms_norm.add_rms_norm(empty, empty, weight, EPS)
    ops.gated_act.gated_act(empty)
    ops.qk_norm_rope.qk_norm_rope(
        torch.zeros(0, 72), none, weight, weight, frequencies(24), 1, 1, 24, EPS
    )
    pools = ops.inject_kv.KVPools.build(*make_pools(1, 3, 1, 24, torch.float32, False))
    for committed in (None, torch.zeros(0, dtype=torch.int32)):
        ops.inject_kv.inject_kv(
            torch.zeros(0, 1, 2, 1, 24),
            none,
            none,
            pools,
            weight[None],
            frequencies(24),
            EPS,
            committed=committed,
        )


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
        ops.inject_kv.KVPools.build(key, value)


def test_faulty_arguments() -> None:
    x, weight = torch.zeros(2, 24), torch.ones(24)
    with pytest.raises(ValueError, match="weight"):
        ops.add_rms_norm.add_rms_norm(x, None, torch.ones(23), EPS)
    with pytest.raises(ValueError, match="residual"):
        ops.add_rms_norm.add_rms_norm(x, x.half(), weight, EPS)
    with pytest.raises(ValueError, match="contiguous"):
        ops.add_rms_norm.add_rms_norm(torch.zeros(24, 2).T, None, weight, EPS)
    with pytest.raises(ValueError, match="gate_up"):
        ops.gated_act.gated_act(torch.zeros(2, 23))

    def rotate(qkv: Tensor, positions: Tensor, key_weight: Tensor | None, rotary: int) -> None:
        ops.qk_norm_rope.qk_norm_rope(
            qkv, positions, weight, key_weight, frequencies(rotary), 1, 1, 24, EPS
        )

    rows, qkv = torch.arange(2), torch.zeros(2, 72)
    for arguments, message in (
        ((torch.zeros(2, 71), rows, weight, 24), "qkv"),
        ((qkv, rows, None, 24), "both norm weights"),
        ((qkv, rows, torch.ones(23), 24), "norm weights must"),
        ((qkv, rows.int(), weight, 24), "positions must be int64"),
        ((qkv, rows, weight, 26), "13 inverse frequencies do not fit head_dim 24"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate(*arguments)

    def inject(kv: Tensor, slots: Tensor, committed: Tensor | None, weights: Tensor) -> None:
        pools = ops.inject_kv.KVPools.build(*make_pools(1, 3, 1, 24, torch.float32, False))
        ops.inject_kv.inject_kv(
            kv, rows, slots, pools, weights, frequencies(24), EPS, committed=committed
        )

    kv = torch.zeros(2, 1, 2, 1, 24)
    for arguments, message in (
        ((kv[:, :, :1], rows, None, weight[None]), "kv must be"),
        ((kv, rows.int(), None, weight[None]), "slots"),
        ((kv, rows, None, weight), "key_weights"),
        ((kv, rows, torch.ones(2), weight[None]), "committed must be int32"),
        ((kv, rows, torch.ones(3, dtype=torch.int32), weight[None]), "2 rows are no multiple of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            inject(*arguments)


BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved, gemma, value scale": {
        "rope": RopeConfig(interleaved=True, partial_rotary_factor=0.5),
        "norm_style": "gemma",
        "attention_value_scale": 0.5,
    },
    "no query norm, gelu": {"qk_norm": False, "hidden_act": "gelu"},
    "DFlash 2": DFLASH2,
    "DFlash 2, three taps, gemma": {
        **DFLASH2,
        "convolution": ConvolutionConfig(kernel_size=3, group_size=16),
        "norm_style": "gemma",
    },
}


@pytest.mark.parametrize("weights", ["checkpoint", "fp8"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_run_block_is_the_cores(kind: str, weights: str) -> None:
    """Attention that only looks at its own row keeps this about the kernels."""
    drafter = tiny_drafter(tiny_target(), intermediate_size=48, **BLOCKS[kind]).to(DEVICE)
    if weights == "fp8":
        quantize_drafter(drafter)
        assert all(takes_rounded(layer.mlp.down_proj) for layer in drafter.layers)
    embedded = random(9, 32)
    positions = torch.arange(9) * 13

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weight = (query.unflatten(-2, (2, 2)) * key.unsqueeze(-2)).sum(-1, keepdim=True)
        return (weight.tanh() * value.unsqueeze(-2)).flatten(-3, -2)

    with torch.no_grad():
        expected = drafter.run_block(embedded, positions, attend)
        out = ops.block.run_block(drafter, embedded.clone(), positions, attend)
        features = random(9, 64)
        context = drafter.fuse(features)
        fused = ops.block.fuse(drafter, features, rounds=weights == "fp8")
    if weights == "fp8":  # A value that falls to its neighbor moves by a sixteenth.
        fused = fused.values.float() * fused.scales[:, None]
        assert error(out, expected) < 0.05
        assert error(fused, context) < 0.05
    else:
        # What layers and taps add up is off in the core as well: the kernels are no further off.
        with torch.no_grad():
            exact = deepcopy(drafter).double().run_block(embedded.double(), positions, attend)
        bound = 2 * error(expected.double(), exact) + BOUND[torch.float32]
        assert error(out.double(), exact) < bound
        if DEVICE.type == "cpu":  # A GPU's library adds up in an order of its own.
            assert error(out, expected) < 3 * BOUND[torch.float32]
        assert error(fused, context) < BOUND[torch.float32]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("by", ["draft_head", "best_logits"])
def test_the_walk_is_the_cores(by: str, sampled: bool) -> None:
    drafter = tiny_drafter(tiny_target(), logit_scale=0.5, logit_softcap=4.0, **DFLASH2).to(DEVICE)
    hidden, anchors, positions = random(2, 3, 32), integers(0, 97, 2), integers(0, 90, 2)
    rows = hidden.flatten(0, 1)
    sampling = temperature = u = None
    if sampled:
        params = [SamplingParams(0.8, seed=5), SamplingParams()]
        sampling = SamplingTensors.build(params, DEVICE)
        temperature = sampling.temperature
        u = uniforms(sampling.seed, positions[:, None] + torch.arange(1, 4), Stream.DRAFT)
    head = cast(nn.Linear, drafter.head())
    with torch.no_grad():
        expected = drafter.propose(hidden, anchors, positions, sampling)
        if by == "draft_head":
            best = draft_head(rows, head.weight, top_k=5, scale=0.5, softcap=4.0)
        else:
            best = best_logits(head(rows), 5, scale=0.5, softcap=4.0)
        gates = drafter.candidate_selector.hidden_projection(rows)
        found = Candidates(best.tokens, best.logits, gates)
        with mock.patch("dflash_plugin.kernels.available", return_value=True):
            out = select_drafts(drafter, found, anchors, temperature, u)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.scores, expected.scores)
    torch.testing.assert_close(out.confidence, expected.confidence)
    if sampled:
        torch.testing.assert_close(out.probs, expected.probs)


def test_the_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dflash_plugin.kernels as kernels\n"
        "assert not kernels.available(torch.device('cpu'))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
