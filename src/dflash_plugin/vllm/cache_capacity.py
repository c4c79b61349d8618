"""Groups of the paged cache and tokens that it holds, with and without the drafter."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import wraps
from typing import NamedTuple

from dflash_plugin.vllm.protocols import (
    KVCacheConfig,
    KVCacheGroup,
    KVCacheSpec,
    Method,
    VllmConfig,
)
from dflash_plugin.vllm.surface import GROUPS, attach

logger = logging.getLogger("vllm.dflash_plugin")


class Capacity(NamedTuple):
    """What groups of the cache need.

    Attributes:
        groups: their number.
        block_bytes: bytes of one block of the largest group.
        blocks: blocks of a request of the greatest length, in all groups.
    """

    groups: int
    block_bytes: int
    blocks: int

    @classmethod
    def of(cls, groups: Sequence[KVCacheGroup], vllm_config: VllmConfig) -> Capacity:
        """What ``groups`` need."""
        pages = [sum(spec.page_size_bytes for spec in layer_specs(group)) for group in groups]
        kinds = [group.kv_cache_spec for group in groups]
        blocks = [-(-k.max_memory_usage_bytes(vllm_config) // k.page_size_bytes) for k in kinds]
        return cls(len(groups), max(pages), sum(blocks))

    def tokens(self, memory: int, length: int) -> int:
        """Tokens in ``memory`` bytes by vLLM's measure: of requests of ``length`` tokens."""
        return memory // self.block_bytes * length // self.blocks


def layer_specs(group: KVCacheGroup) -> Collection[KVCacheSpec]:
    """The kind of cache of each layer of a group."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    kind = group.kv_cache_spec
    if isinstance(kind, UniformTypeKVCacheSpecs):
        by_layer: dict[str, KVCacheSpec] = kind.kv_cache_specs
        return by_layer.values()
    return [kind] * len(group.layer_names)


def remember(
    vllm_config: VllmConfig, groups: Sequence[KVCacheGroup], alone: Sequence[KVCacheGroup]
) -> None:
    """Keep the groups with and without the drafter for ``report_capacity``."""
    setattr(vllm_config, GROUPS, (groups, alone))


def report_capacity(native: Method) -> Method:
    """``update_kv_cache_capacity`` that logs, and keeps for the metrics, what the drafter costs."""

    @wraps(native)
    def update_kv_cache_capacity(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        native(vllm_config, kv_cache_config)
        divided = vars(vllm_config).get(GROUPS)
        if divided is None:
            return
        ours, alone = (Capacity.of(groups, vllm_config) for groups in divided)
        memory = kv_cache_config.num_blocks * ours.block_bytes
        length = vllm_config.model_config.max_model_len
        tokens, without = ours.tokens(memory, length), alone.tokens(memory, length)
        logger.info(
            "the KV cache has %d groups and holds %d tokens; without the drafter's layers, %d "
            "groups and %d tokens",
            *(ours.groups, tokens, alone.groups, without),
        )
        lost = max(without - tokens, 0)
        attach(vllm_config, {"kv_cache_groups": ours.groups, "kv_cache_tokens_lost": lost})

    return update_kv_cache_capacity
