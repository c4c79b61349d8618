"""Torch in place of the copies between a GPU's cache and the host's, for one that is on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def copy_slots(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """Copy slots of layers [slots, heads, width] to others, as ``transfer_kv_direct`` does."""
    for source, destination in zip(src_layers, dst_layers, strict=True):
        destination[dst_indices] = source[src_indices]


def turn_on() -> None:
    """For SGLang's hierarchical cache in this process."""
    from sglang.srt.mem_cache.pool_host import common, mha

    common._cuda_host_register = lambda *_: None
    mha.transfer_kv_direct = copy_slots
