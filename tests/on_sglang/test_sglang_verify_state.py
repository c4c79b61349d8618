"""The size of a recurrent target's state, beside what SGLang's own pool allocates."""

from __future__ import annotations

from typing import Any

import torch

from dflash_plugin.sglang.verify_state import verify_state

LAYERS, REQUESTS, ROWS = [0, 1, 3], 6, 8
HEADS, WIDTH, STATE = 4, 8, 16


def pool_of(
    rows: int | None = ROWS, requests: int = REQUESTS, dtype: torch.dtype = torch.float32
) -> Any:
    from sglang.srt.configs.mamba_utils import (
        Mamba2CacheParams,
        Mamba2StateDType,
        Mamba2StateShape,
    )
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool

    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=HEADS * WIDTH,
        n_groups=2,
        num_heads=HEADS,
        head_dim=WIDTH,
        state_size=STATE,
        conv_kernel=4,
    )
    numbers = Mamba2StateDType(conv=torch.float32, temporal=dtype)
    return HybridReqToTokenPool(
        size=requests,
        mamba_size=20,
        mamba_spec_state_size=requests,
        max_context_len=64,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, layers=LAYERS, dtype=numbers),
        mamba_layer_ids=LAYERS,
        enable_mamba_extra_buffer=False,
        speculative_num_draft_tokens=rows,
        speculative_eagle_topk=1,
    )


def test_what_is_counted_is_what_is_allocated():
    found = verify_state(pool_of())
    assert found is not None
    row = len(LAYERS) * HEADS * WIDTH * STATE * 4
    assert (found.slots, found.rows, found.itemsize) == (REQUESTS + 1, ROWS, 4)
    assert found.recurrent == row * (REQUESTS + 1) * ROWS
    windows = found.total - found.recurrent
    assert 0 < windows < found.recurrent
    # What each flag is said to leave, beside what a pool of that setting takes.
    for flag, changed in (
        ({"item": 2}, {"dtype": torch.bfloat16}),
        ({"rows": ROWS // 2}, {"rows": ROWS // 2}),
        ({"slots": 4}, {"requests": 3}),
    ):
        smaller = verify_state(pool_of(**changed))
        assert smaller is not None
        assert found.limited(**flag) - windows == smaller.recurrent
        assert smaller.total <= found.limited(**flag)
    assert verify_state(pool_of(rows=None)) is None
