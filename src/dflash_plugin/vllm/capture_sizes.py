"""How far vLLM captures CUDA graphs where the user leaves it open.

vLLM captures passes of up to 512 rows. A block has up to 16 rows a request, so that batches of more
than 32 requests would draft, and mostly verify, without a graph.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("vllm.dflash_plugin")

# What vLLM captures by itself on most GPUs, and what is captured for a drafter, in rows.
OF_VLLM, MOST = 512, 1024
# Requests of a batch where none are given: vLLM's smallest default.
REQUESTS = 256
# Bytes of a GPU that has room for more graphs; vLLM's defaults are larger from here on too.
LARGE = 70 << 30


def capture_more(arguments: Any, block_rows: int) -> None:
    """Let vLLM capture graphs up to whole blocks of all requests, 1,024 rows at most.

    Sizes lie as far apart as vLLM's own: 8 rows up to 256, then 16, and whole blocks of some
    numbers of requests.

    Args:
        arguments: vLLM's ``EngineArgs``; left alone where they say what to capture, and on a GPU of
            less than 70 GiB.
        block_rows: rows of a request that are verified, anchor included.
    """
    compilation = arguments.compilation_config
    given = (
        arguments.cudagraph_capture_sizes,
        arguments.max_cudagraph_capture_size,
        compilation.cudagraph_capture_sizes,
        compilation.max_cudagraph_capture_size,
    )
    most = min(MOST, (arguments.max_num_seqs or REQUESTS) * block_rows)
    if arguments.enforce_eager or any(value is not None for value in given) or most <= OF_VLLM:
        return
    if not _is_large_gpu():
        return
    most -= most % 16
    grid = {1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)}
    whole = {requests * block_rows for requests in (1, 2, 4, *range(8, 256, 8))}
    arguments.cudagraph_capture_sizes = sorted(grid | {rows for rows in whole if rows <= most})
    logger.info("CUDA graphs hold up to %d rows (vLLM's default: %d)", most, OF_VLLM)


def _is_large_gpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda() and current_platform.get_device_total_memory() >= LARGE)
