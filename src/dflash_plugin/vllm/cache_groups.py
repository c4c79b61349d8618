"""Groups of the paged cache: the drafter leaves a target's as they are without it.

vLLM gives each kind of layer cache groups of its own, as large as the rarest kind has layers; a
group has a block table and metadata in every step. Beside a target with recurrent layers, the few
layers of a drafter would make up to one group a layer. Beside one with two kinds of attention they
may be divided among groups, which the V1 runner does not run. Here the target's layers are divided
first. The drafter's layers join those of the target's attention or make one group more, whichever
leaves room for more tokens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields
from functools import wraps
from typing import NamedTuple

from dflash_plugin.vllm.cache_capacity import Capacity, remember
from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import KVCacheGroup, KVCacheSpec, VllmConfig

Specs = dict[str, KVCacheSpec]
Groups = list[KVCacheGroup]
Divide = Callable[[VllmConfig, Specs], Groups]

# A draft layer may be several of vLLM's; see ``attention.PagedAttention``.
LAYER = re.compile(r"layers\.(\d+)\.self_attn\.attn(_\d+)?$")


class Kind(NamedTuple):
    """Layers with the same kind of cache.

    Attributes:
        layers: their names.
        groups: the number of groups that they may make.
    """

    layers: list[str]
    groups: int

    def sizes(self) -> set[int]:
        """Layers of the largest group, for each number of groups."""
        return {-(-len(self.layers) // count) for count in range(1, self.groups + 1)}

    def divided(self, size: int) -> list[list[str]]:
        """As few groups of up to ``size`` layers as the kind needs."""
        count = -(-len(self.layers) // size)
        return [self.layers[index::count] for index in range(count)]


def keep_target_groups(native: Divide) -> Divide:
    """``get_kv_cache_groups`` that makes at most one group more than without the drafter."""

    @wraps(native)
    def get_kv_cache_groups(vllm_config: VllmConfig, kv_cache_spec: Specs) -> Groups:
        target, draft = split(vllm_config, kv_cache_spec)
        if not target or not draft:
            return native(vllm_config, kv_cache_spec)
        alone = native(vllm_config, {name: kv_cache_spec[name] for name in target})
        together = native(vllm_config, dict(kv_cache_spec))
        plans: list[Groups] = []

        def runs(plan: Groups) -> bool:
            # The V1 runner has one block table for all draft layers.
            is_v2: bool = vllm_config.use_v2_model_runner
            return is_v2 or sum(map(_holder(draft), plan)) == 1

        if vllm_config.model_config.is_hybrid or not runs(together):
            even = with_even_pages(native, kv_cache_spec)
            divided = native(vllm_config, {name: even[name] for name in target})
            frees = not hits_end_in_blocks(vllm_config)
            plans = plans_beside(divided, even, draft, frees_blocks=frees)
            if even != kv_cache_spec and len(together) <= len(alone) + 1:
                # A layout may take uneven pages as they are.
                plans.append(together)
            plans = [plan for plan in plans if runs(plan)]

        def cost(plan: Groups) -> tuple[int, int]:
            needed = Capacity.of(plan, vllm_config)
            return needed.block_bytes * needed.blocks, needed.groups

        best = min(plans, key=cost, default=together)
        remember(vllm_config, best, alone)
        return best

    return get_kv_cache_groups


def split(vllm_config: VllmConfig, specs: Specs) -> tuple[list[str], list[str]]:
    """Names of the target's layers and of this project's drafter's, of which there may be none."""
    first = vllm_config.model_config.get_total_num_hidden_layers()
    if drafter_spec(vllm_config.speculative_config) is None:
        return list(specs), []
    numbers = {name: LAYER.search(name) for name in specs}
    draft = [name for name, found in numbers.items() if found and int(found[1]) >= first]
    return [name for name in specs if name not in draft], draft


def hits_end_in_blocks(vllm_config: VllmConfig) -> bool:
    """Whether prefix hits may end within a block, which no group that frees blocks allows."""
    cache = vllm_config.cache_config
    return bool(cache.enable_prefix_caching and cache.prefix_match_unit is not None)


def with_even_pages(native: Divide, specs: Specs) -> Specs:
    """``specs`` with pages of one size, as vLLM makes them, or as they are where it cannot."""
    unify = vars(sys.modules[native.__module__])["unify_kv_cache_spec_page_size"]
    try:
        even: Specs = unify(dict(specs))
    except NotImplementedError:
        return specs
    return even


def plans_beside(
    divided: Groups, specs: Specs, draft: Sequence[str], *, frees_blocks: bool
) -> list[Groups]:
    """Ways to lay a drafter's layers beside a target's groups.

    Args:
        divided: the target's groups.
        specs: kinds of cache of all layers.
        draft: names of the drafter's layers.
        frees_blocks: whether a group of layers with windows may free blocks behind them.

    Returns:
        Groups of each way; no way where pages differ in size, or the target has no attention over
        all tokens.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    kinds = list(_kinds(divided, specs))
    full = next((k for k in kinds if isinstance(specs[k.layers[0]], FullAttentionSpec)), None)
    if full is None or len({spec.page_size_bytes for spec in specs.values()}) > 1:
        return []
    windowed = [name for name in draft if specs[name].sliding_window is not None]
    # Layers that allocate for all tokens may have a window too; see ``attention.DraftAttention``.
    able = [name for name in draft if isinstance(specs[name], FullAttentionSpec)]
    plans = []
    for joining in (able, [name for name in able if name not in windowed], []):
        joined = [k._replace(layers=k.layers + joining) if k is full else k for k in kinds]
        apart = {name: specs[name] for name in draft if name not in joining}
        if frees_blocks and set(apart) <= set(windowed):
            apart = {name: _recycling(spec) for name, spec in apart.items()}
        alike = [apart] if not apart or _group(apart) else list(_by_window(apart))
        least = max(*map(len, alike), *(min(kind.sizes()) for kind in joined))
        sizes = {least}.union(*(kind.sizes() for kind in joined))
        for size in sorted(size for size in sizes if size >= least):
            parts = [part for kind in joined for part in kind.divided(size)]
            layers = [{name: specs[name] for name in part} for part in parts]
            groups = [_group(one) for one in (*layers, *alike) if one]
            if all(groups):
                plans.append([group for group in groups if group is not None])
    return plans


def _by_window(specs: Specs) -> Iterator[Specs]:
    """Layers with each window apart, for a back end that wants one window in a group."""
    for window in dict.fromkeys(spec.sliding_window for spec in specs.values()):
        yield {name: spec for name, spec in specs.items() if spec.sliding_window == window}


def _kinds(groups: Groups, order: Collection[str]) -> Iterator[Kind]:
    """Groups of like layers taken together, their layers in the model's order."""
    rest = list(groups)
    while rest:
        like = [group for group in rest if group.kv_cache_spec == rest[0].kv_cache_spec]
        rest = [group for group in rest if group not in like]
        names = {name for group in like for name in group.layer_names}
        yield Kind([name for name in order if name in names], len(like))


def _recycling(spec: KVCacheSpec) -> KVCacheSpec:
    """The kind of cache that frees blocks behind its window."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, replace_as

    if not isinstance(spec, FullAttentionSpec):
        return spec
    named = {field.name for field in fields(SlidingWindowSpec)}
    drop = {field.name for field in fields(spec)} - named
    recycling: KVCacheSpec = replace_as(spec, SlidingWindowSpec, drop=drop)
    return recycling


def _group(specs: Specs) -> KVCacheGroup | None:
    """One group of layers, or None where their kinds differ too much."""
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, UniformTypeKVCacheSpecs

    first, *_ = kinds = list(specs.values())
    try:
        kind = first.merge(kinds)
    except (AssertionError, ValueError):
        kind = UniformTypeKVCacheSpecs.from_specs(specs)
    return None if kind is None else KVCacheGroupSpec(list(specs), kind)


def _holder(names: Collection[str]) -> Callable[[KVCacheGroup], bool]:
    return lambda group: not set(names).isdisjoint(group.layer_names)
