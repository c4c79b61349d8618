"""Groups of vLLM's KV cache beside targets with recurrent layers, and the tokens that they hold.

    python benchmarks/vllm_cache_groups.py --output benchmarks/results/vllm-cache-groups.json

Nothing is run: layers ask for the pages that they ask for in an engine, and vLLM's own functions
divide them. "native" is vLLM's DFlash, "alone" the target without speculative decoding. Tokens are
counted as vLLM counts them in "KV cache size", in the same memory for all. "cached" are the tokens
of a repeated prompt that vLLM's manager finds again; "cached_dropping" is the same where the last
block is dropped, as vLLM 0.31 and 0.32 do for a method that reads hidden states.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import vllm
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
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
from dflash_plugin.vllm.cache_capacity import Capacity

HALF = torch.bfloat16
DRAFTS, BATCHED_TOKENS, PROMPT, GIB = 15, 8192, 8192, 1 << 30
# Tokens of a block are a multiple of it, for FlashAttention.
ALIGNMENT = 16


class Target(NamedTuple):
    """A target of Qwen's: layers, attention of the full ones, value heads of the recurrent ones."""

    name: str
    recurrent: int
    full: int
    kv_heads: int
    head_dim: int
    value_heads: int
    ranks: int = 1


class Drafter(NamedTuple):
    """A drafter: layers, attention and window."""

    windowed: int
    full: int
    kv_heads: int
    head_dim: int
    window: int = 0


QWEN_9B = Target("Qwen3.5-9B", 24, 8, 4, 256, 32)
QWEN_27B = Target("Qwen3.5-27B", 48, 16, 4, 256, 48)
PAIRS = [
    (QWEN_9B, Drafter(5, 1, 8, 128, 4096)),
    (QWEN_27B, Drafter(5, 1, 8, 128, 4096)),
    (QWEN_27B, Drafter(5, 0, 8, 128, 2048)),
    (Target("Qwen3.5-35B-A3B", 30, 10, 2, 256, 32), Drafter(5, 1, 8, 128, 4096)),
    (Target("Qwen3-Coder-Next", 36, 12, 2, 256, 32), Drafter(0, 8, 4, 128)),
    (QWEN_27B._replace(name="Qwen3.5-27B on 8 GPUs", ranks=8), Drafter(5, 1, 8, 128, 4096)),
]


def layers_of_target(target: Target, drafts: int) -> dict[str, Any]:
    """The kind of cache of each layer of one rank; every last of a few layers is a full one."""
    conv, recurrent = MambaStateShapeCalculator.gated_delta_net_state_shape(
        target.ranks, 16, target.value_heads, 128, 128, 4, drafts
    )
    heads = max(target.kv_heads // target.ranks, 1)
    state = {"shapes": (conv, recurrent), "dtypes": (HALF, torch.float32)}
    of_token = 2 * heads * target.head_dim * HALF.itemsize
    size = MambaSpec(block_size=1, **state).page_size_bytes
    block = ALIGNMENT * math.ceil(size / (ALIGNMENT * of_token))
    full = FullAttentionSpec(
        block_size=block, num_kv_heads=heads, head_size=target.head_dim, dtype=HALF
    )
    state |= {"block_size": block, "page_size_padded": full.page_size_bytes}
    state |= {"mamba_cache_mode": "align", "num_speculative_blocks": drafts}
    total = target.recurrent + target.full
    every = total // target.full
    return {
        f"model.layers.{number}.self_attn.attn": full
        if number % every == every - 1
        else MambaSpec(**state)
        for number in range(total)
    }


def config(target: Target, layers: dict[str, Any], length: int, *, drafts: bool) -> Any:
    """What vLLM's functions read of an engine's configuration."""
    block = next(iter(layers.values())).block_size
    layout = SimpleNamespace(is_block_outermost=False, is_block_compact=True)
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            use_eagle=lambda: False, use_eagle_block_drop=lambda: False, is_ours=drafts
        ),
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: target.recurrent + target.full,
            get_num_kv_heads=lambda parallel: max(target.kv_heads // target.ranks, 1),
            get_head_size=lambda: target.head_dim,
            is_hybrid=True,
            use_mla=False,
            max_model_len=length,
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            mamba_cache_mode="align",
            block_size=block,
            enable_prefix_caching=True,
            prefix_match_unit=None,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        compilation_config=SimpleNamespace(static_forward_context={}),
        kv_transfer_config=None,
        max_in_flight_tokens=BATCHED_TOKENS,
        use_v2_model_runner=True,
    )


def layers_of_drafter(drafter: Drafter, target: Target, settings: Any) -> dict[str, Any]:
    """As this project's layers ask for the cache, or vLLM's."""
    ours = settings.speculative_config.is_ours
    heads = max(drafter.kv_heads // target.ranks, 1)
    pages = page_count(heads, drafter.head_dim, settings) if ours else 1
    shape = {"num_kv_heads": heads // pages, "head_size": drafter.head_dim, "dtype": HALF}
    shape["block_size"] = settings.cache_config.block_size
    window = FullAttentionSpec if ours else SlidingWindowSpec
    kinds = [window(**shape, sliding_window=drafter.window)] * drafter.windowed
    kinds += [FullAttentionSpec(**shape)] * drafter.full
    first = settings.model_config.get_total_num_hidden_layers()
    return {
        f"model.layers.{first + number}.self_attn.attn_{page}": as_large_as_target(kind, settings)
        if ours
        else kind
        for number, kind in enumerate(kinds)
        for page in range(pages)
    }


def divided(target: Target, drafter: Drafter | None, length: int, ours: bool) -> dict[str, Any]:
    """Groups, tokens that they hold, and tokens of a prompt that they find again."""
    layers = layers_of_target(target, 0 if drafter is None else DRAFTS)
    settings = config(target, layers, length, drafts=ours)
    if drafter is not None:
        layers = layers | layers_of_drafter(drafter, target, settings)
    name = surface.CACHE_PLANNING if compat.installed() >= "0.33" else surface.CACHE_UTILS
    planning = __import__(name, fromlist=["get_kv_cache_groups"])
    groups = planning.get_kv_cache_groups(settings, layers)
    return {
        "groups": len(groups),
        "tokens_in_gib": Capacity.of(groups, settings).tokens(GIB, length),
        "cached": cached_tokens(groups, length, drops=False),
        "cached_dropping": cached_tokens(groups, length, drops=True),
    }


def cached_tokens(groups: list[Any], length: int, *, drops: bool) -> int:
    """Tokens of a repeated prompt that vLLM's manager finds, after steps that end at blocks."""
    cache = KVCacheConfig(num_blocks=4000, kv_cache_tensors=[], kv_cache_groups=groups)
    blocks = [group.kv_cache_spec.block_size for group in groups]
    manager = KVCacheManager(
        kv_cache_utils.generate_scheduler_kv_cache_config([cache]),
        max_model_len=length,
        scheduler_block_size=math.lcm(*blocks),
        hash_block_size=math.gcd(*blocks),
        max_in_flight_tokens=BATCHED_TOKENS,
        use_eagle=drops,
    )
    kv_cache_utils.init_none_hash(sha256)
    hasher = kv_cache_utils.get_request_block_hasher(math.gcd(*blocks), sha256)
    first, again = (
        Request(name, list(range(PROMPT)), SamplingParams(max_tokens=1), None, block_hasher=hasher)
        for name in ("first", "again")
    )
    while (left := PROMPT - first.num_computed_tokens) > 0:
        step = min(left, *blocks)
        assert manager.allocate_slots(first, step) is not None, "more blocks are needed"
        first.num_computed_tokens += step
    manager.free(first)
    found: int = manager.get_computed_blocks(again)[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", default="32768,131072", help="greatest lengths of a request")
    args = parser.parse_args()
    register()
    # The drafters here have no files to be known by.
    cache_groups.drafter_spec = lambda speculative: speculative.is_ours or None
    rows = [
        {
            "target": target._asdict(),
            "drafter": drafter._asdict(),
            "length": length,
            "alone": divided(target, None, length, ours=False),
            "native": divided(target, drafter, length, ours=False),
            "plugin": divided(target, drafter, length, ours=True),
        }
        for target, drafter in PAIRS
        for length in map(int, args.lengths.split(","))
    ]
    record = {
        "command": " ".join(["python", *sys.argv]),
        "vllm": vllm.__version__,
        "date": datetime.date.today().isoformat(),
        "drafts": DRAFTS,
        "prompt": PROMPT,
        "rows": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
