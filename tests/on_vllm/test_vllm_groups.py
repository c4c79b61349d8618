"""Groups of the KV cache beside targets with two kinds of layer, made by vLLM's own functions."""

from __future__ import annotations

import logging
from collections.abc import Collection
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils as utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from dflash_plugin.vllm import cache_groups, compat, register, surface
from dflash_plugin.vllm.attention import as_large_as_target, page_count
from dflash_plugin.vllm.cache_capacity import report_capacity

HALF, BLOCK, WINDOW = torch.bfloat16, 528, 4096
# Recurrent and full layers of targets, which make four groups alone.
TARGETS = [(18, 6), (24, 8), (30, 10), (48, 16)]
SHORT, LONG = WINDOW, 16 * WINDOW


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    register()
    monkeypatch.setattr(
        cache_groups, "drafter_spec", lambda speculative: speculative.is_ours or None
    )


def planning() -> Any:
    """vLLM's module that divides layers into groups."""
    name = surface.CACHE_PLANNING if compat.installed() >= "0.33" else surface.CACHE_UTILS
    return __import__(name, fromlist=["get_kv_cache_groups"])


def attention(heads: int = 4, width: int = 256, block: int = BLOCK) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=width, dtype=HALF)


def layers_of_target(recurrent: int, full: int) -> dict[str, Any]:
    """Every fourth layer is a full one, as in Qwen3-Next and Qwen3.5."""
    every, found = (recurrent + full) // full, {}
    state = MambaSpec(
        block_size=BLOCK,
        shapes=((3, 8192), (32, 128, 128)),
        dtypes=(HALF, HALF),
        page_size_padded=attention().page_size_bytes,
        mamba_cache_mode="align",
    )
    for number in range(recurrent + full):
        if number % every == every - 1:
            found[f"model.layers.{number}.self_attn.attn"] = attention()
        else:
            found[f"model.layers.{number}.linear_attn"] = state
    return found


def layers_of_drafter(
    first: int, windowed: int, full: int, heads: int, width: int, joins: bool, fits: bool = True
) -> dict[str, Any]:
    """As ``DraftAttention`` asks.

    Args:
        joins: windows allocate like full layers, which they may join.
        fits: pages are made as large as the target's.
    """
    settings = config({})
    pages = page_count(heads, width, settings) if fits else 1
    shape = {"block_size": BLOCK, "num_kv_heads": heads // pages, "head_size": width, "dtype": HALF}
    window = (
        FullAttentionSpec(**shape, sliding_window=WINDOW)
        if joins
        else SlidingWindowSpec(**shape, sliding_window=WINDOW)
    )
    kinds = [window] * windowed + [FullAttentionSpec(**shape)] * full
    if fits:
        kinds = [as_large_as_target(kind, settings) for kind in kinds]
    names = [f"model.layers.{first + i}.self_attn.attn" for i in range(len(kinds))]
    return {
        f"{name}_{page}" if page else name: kind
        for name, kind in zip(names, kinds, strict=True)
        for page in range(pages)
    }


def config(
    target: dict[str, Any], length: int = LONG, is_v2: bool = True, drafts: bool = True
) -> Any:
    layout = SimpleNamespace(is_block_outermost=False, is_block_compact=True)
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            use_eagle=lambda: False, use_eagle_block_drop=lambda: False, is_ours=drafts
        ),
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: len(target), is_hybrid=True, max_model_len=length,
            use_mla=False, get_num_kv_heads=lambda parallel: 4, get_head_size=lambda: 256,
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout, mamba_cache_mode="align",
            block_size=BLOCK, enable_prefix_caching=True, prefix_match_unit=None,
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
        kv_transfer_config=None,
        attention_config=SimpleNamespace(hisparse_config=None),
        max_in_flight_tokens=8192,
        use_v2_model_runner=is_v2,
    )  # fmt: skip


def divided(target: dict[str, Any], drafter: dict[str, Any], **settings: Any) -> list[Any]:
    """The groups that vLLM makes."""
    return planning().get_kv_cache_groups(config(target, **settings), {**target, **drafter})


def sizes(groups: list[Any]) -> list[int]:
    return [len(group.layer_names) for group in groups]


def holders(groups: list[Any], layers: Collection[str]) -> int:
    """The number of groups that hold these layers."""
    return sum(not set(layers).isdisjoint(group.layer_names) for group in groups)


def check_partition(groups: list[Any], layers: dict[str, Any]) -> None:
    """Every layer is in one group, with its own heads and width, and pages are of one size."""
    assert sorted(name for group in groups for name in group.layer_names) == sorted(layers)
    by_layer = {}
    for group in groups:
        several = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        by_layer |= several or dict.fromkeys(group.layer_names, group.kv_cache_spec)
    assert len({spec.page_size_bytes for spec in by_layer.values()}) == 1
    for name, spec in layers.items():
        if not isinstance(spec, MambaSpec):
            shape = attrgetter("num_kv_heads", "head_size")
            assert shape(by_layer[name]) == shape(spec)


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("windowed_and_full", [(5, 1), (5, 0), (0, 5), (4, 1), (8, 0)])
@pytest.mark.parametrize("shape", [(8, 128), (4, 256), (4, 128), (8, 256), (6, 128)])
@pytest.mark.parametrize("layers", TARGETS)
def test_a_drafter_makes_one_group_more_at_most(layers, shape, windowed_and_full, joins, length):
    target = layers_of_target(*layers)
    drafter = layers_of_drafter(len(target), *windowed_and_full, *shape, joins=joins)
    alone = planning().get_kv_cache_groups(config(target, length), dict(target))
    groups = divided(target, drafter, length=length)
    assert len(alone) == 4
    assert len(groups) <= 5
    check_partition(groups, {**target, **drafter})
    # So prefix hits end where they end without a drafter.
    assert {group.kv_cache_spec.block_size for group in groups} == {BLOCK}


@pytest.mark.parametrize("shape", [(4, 128), (8, 256)])
@pytest.mark.parametrize("layers", TARGETS)
def test_pages_of_two_sizes_and_one_window_in_a_group_make_two_more(layers, shape):
    """As under a back end that divides blocks, which takes no padded pages."""
    target = layers_of_target(*layers)
    drafter = layers_of_drafter(len(target), 5, 1, *shape, joins=False, fits=False)
    groups = divided(target, drafter)
    assert len(groups) == 6
    check_partition(groups, {**target, **drafter})


def test_natively_it_is_a_group_for_each_layer():
    """What the other tests prevent: vLLM's rule on the same layers."""
    target = layers_of_target(24, 8)
    drafter = layers_of_drafter(32, 5, 1, 8, 128, joins=False)
    assert sizes(divided(target, drafter, length=LONG, drafts=False)) == [1] * 38


@pytest.mark.parametrize(
    ("length", "windowed", "full", "expected"),
    [
        # Longer than the window: its layers free blocks behind it.
        (LONG, 5, 1, [8, 8, 8, 9, 5]),
        (LONG, 5, 0, [8, 8, 8, 8, 5]),
        # Not longer: they would free none.
        (SHORT, 5, 1, [12, 12, 14]),
        (LONG, 0, 5, [12, 12, 13]),
    ],
)
def test_the_division_that_holds_most_tokens_is_taken(length, windowed, full, expected):
    target = layers_of_target(24, 8)
    drafter = layers_of_drafter(32, windowed, full, 8, 128, joins=True)
    groups = divided(target, drafter, length=length)
    assert sizes(groups) == expected
    recycled = [
        n for g in groups if isinstance(g.kv_cache_spec, SlidingWindowSpec) for n in g.layer_names
    ]
    assert recycled == (list(drafter)[:windowed] if length == LONG else [])


def test_the_v1_runner_gets_all_draft_layers_in_one_group():
    target = layers_of_target(24, 8)
    drafter = layers_of_drafter(32, 5, 1, 8, 128, joins=True)
    groups = divided(target, drafter, length=LONG, is_v2=False)
    assert len(groups) <= 5
    assert holders(groups, drafter) == 1


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("drafts", [1, 2, 3, 5])
@pytest.mark.parametrize(("sliding", "full"), [(1, 3), (2, 4), (3, 9), (5, 1), (12, 12)])
def test_the_v1_runner_gets_them_in_one_group_beside_windows_too(sliding, full, drafts, is_v2):
    shape = {"block_size": BLOCK, "num_kv_heads": 4, "head_size": 256, "dtype": HALF}
    window = SlidingWindowSpec(**shape, sliding_window=WINDOW)
    kinds = [window] * sliding + [attention()] * full
    target = {f"model.layers.{i}.self_attn.attn": kind for i, kind in enumerate(kinds)}
    drafter = layers_of_drafter(len(target), 0, drafts, 4, 256, joins=True)
    layers = {**target, **drafter}
    settings = config(target, is_v2=is_v2)
    settings.model_config.is_hybrid = False
    groups = planning().get_kv_cache_groups(settings, dict(layers))
    check_partition(groups, layers)
    settings.speculative_config.is_ours = False
    native = planning().get_kv_cache_groups(settings, dict(layers))
    if is_v2 or holders(native, drafter) == 1:
        assert groups == native
    else:
        assert holders(groups, drafter) == 1


def test_other_targets_and_drafters_are_left_to_vllm():
    target = layers_of_target(24, 8)
    drafter = layers_of_drafter(32, 5, 1, 8, 128, joins=False)
    plain = config(target, LONG)
    plain.model_config.is_hybrid = False
    divide = planning().get_kv_cache_groups
    native = divided(target, drafter, length=LONG, drafts=False)
    assert divide(plain, {**target, **drafter}) == native
    assert divide(config(target, LONG), dict(target)) == divided(
        target, {}, length=LONG, drafts=False
    )


def cached_tokens(groups: list[Any], prompt: int, drops: bool, unit: int = BLOCK) -> int:
    """Tokens of a repeated prompt that vLLM's manager finds, after steps that end at blocks."""
    cache = KVCacheConfig(num_blocks=400, kv_cache_tensors=[], kv_cache_groups=groups)
    cache = utils.generate_scheduler_kv_cache_config([cache])
    manager = KVCacheManager(
        cache,
        max_model_len=LONG,
        scheduler_block_size=BLOCK,
        hash_block_size=unit,
        max_in_flight_tokens=8192,
        use_eagle=drops,
    )
    utils.init_none_hash(sha256)
    hasher = utils.get_request_block_hasher(unit, sha256)
    tokens = list(range(prompt))
    first, again = (
        Request(name, tokens, SamplingParams(max_tokens=8), None, block_hasher=hasher)
        for name in ("first", "again")
    )
    # The scheduler ends a step where the last state that may be found again is.
    last = (prompt - 1) // unit * unit
    while (done := first.num_computed_tokens) < prompt:
        end = min(done + BLOCK, last if done < last else prompt)
        assert manager.allocate_slots(first, end - done) is not None
        first.num_computed_tokens = end
    manager.free(first)
    return manager.get_computed_blocks(again)[1]


@pytest.mark.parametrize("blocks", [3, 20])
@pytest.mark.parametrize(("windowed", "full"), [(5, 1), (5, 0), (0, 5)])
@pytest.mark.parametrize("shape", [(8, 128), (4, 128), (8, 256)])
def test_prefix_hits_beside_a_hybrid_target_are_whole(shape, windowed, full, blocks):
    """As without a drafter; vLLM's drop of the last block, which is off, would cost one."""
    target = layers_of_target(24, 8)
    drafter = layers_of_drafter(32, windowed, full, *shape, joins=True)
    alone = planning().get_kv_cache_groups(config(target), dict(target))
    groups, prompt = divided(target, drafter), blocks * BLOCK + 40
    assert cached_tokens(alone, prompt, drops=False) == blocks * BLOCK
    assert cached_tokens(groups, prompt, drops=False) == blocks * BLOCK
    assert cached_tokens(groups, prompt, drops=True) < blocks * BLOCK


@pytest.mark.parametrize(("windowed", "full"), [(5, 1), (5, 0), (0, 5)])
def test_prefix_hits_within_blocks_stay_with_a_drafter(windowed, full):
    """Those of ``--prefix-match-unit``, which a group that frees blocks would end."""
    target, unit = layers_of_target(24, 8), 48
    settings = config(target)
    settings.cache_config.prefix_match_unit = unit
    drafter = layers_of_drafter(32, windowed, full, 8, 128, joins=True)
    divide, prompt = planning().get_kv_cache_groups, 3 * BLOCK + 5 * unit + 7
    alone = divide(settings, dict(target))
    groups = divide(settings, {**target, **drafter})
    found = cached_tokens(alone, prompt, False, unit)
    assert found == 3 * BLOCK + 5 * unit
    assert cached_tokens(groups, prompt, False, unit) == found
    if windowed:
        freeing = divided(target, drafter)
        assert cached_tokens(freeing, prompt, False, unit) == 3 * BLOCK


def test_the_log_and_the_metrics_say_what_the_drafter_takes(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    target = layers_of_target(24, 8)
    drafter = layers_of_drafter(32, 0, 5, 8, 128, joins=True)
    settings = config(target, LONG)
    groups = planning().get_kv_cache_groups(settings, {**target, **drafter})
    assert sizes(groups) == [12, 12, 13]
    report = report_capacity(lambda vllm_config, kv_cache_config: None)
    with caplog.at_level(logging.INFO):
        report(settings, SimpleNamespace(num_blocks=800))
    # A request has two states in each group of recurrent layers. A block is 13 pages, alone 8.
    blocks = -(-LONG // BLOCK)
    tokens, alone = 800 * LONG // (blocks + 2 * 2), 1300 * LONG // (blocks + 3 * 2)
    assert f"3 groups and holds {tokens} tokens" in caplog.text
    assert f"without the drafter's layers, 4 groups and {alone} tokens" in caplog.text
    counts = {"kv_cache_groups": 3, "kv_cache_tokens_lost": alone - tokens}
    assert surface.attached(settings) == counts
