"""Draft passes of blocks of fewer rows, with vLLM's own speculator.

vLLM's speculator reads the layout of a block from its attributes whenever it prepares, captures or
runs a draft pass. With other values there, the same code drafts shorter blocks. Whole and shorter
blocks have graphs of their own.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dflash_plugin.vllm.protocols import Speculator

logger = logging.getLogger("vllm.dflash_plugin")

# Numbers of requests that passes are captured for, beside the largest of them.
REQUESTS = (1, 2, 4, *range(8, 256, 8))
# The speculator's attribute that holds its graphs.
GRAPHS = "query_cudagraph_manager"


class ShortBlocks:
    """The layout of shorter blocks.

    Args:
        speculator: vLLM's, laid out for whole blocks.
        rows: of a shorter block, the anchor included.

    Attributes:
        rows: of a shorter block, the anchor included.
    """

    def __init__(self, speculator: Speculator, rows: int) -> None:
        self.rows, drafts = rows, rows - 1
        columns = torch.arange(
            drafts, dtype=speculator.sample_col.dtype, device=speculator.sample_col.device
        )
        self._layout: dict[str, Any] = {
            "num_speculative_steps": drafts,
            "num_query_per_req": drafts + (not speculator.sample_from_anchor),
            "sample_col": columns.repeat(speculator.max_num_reqs),
            # A view: the runner takes the drafts of whole blocks, of which these are the first.
            "draft_tokens": speculator.draft_tokens[:, :drafts],
        }

    @contextmanager
    def laid_out(self, speculator: Speculator) -> Iterator[None]:
        """Let the speculator prepare, capture and run passes of shorter blocks."""
        whole = {name: getattr(speculator, name) for name in (*self._layout, GRAPHS)}
        vars(speculator).update(self._layout)
        speculator.query_cudagraph_manager = speculator.short_cudagraph_manager
        try:
            yield
        finally:
            vars(speculator).update(whole)

    def make_graphs(self, speculator: Speculator) -> Any:
        """The manager of the graphs of shorter blocks, none of them captured yet.

        It captures few numbers of requests: a draft pass costs little for some requests more.
        """
        whole, rows = speculator.query_cudagraph_manager, self._layout["num_query_per_req"]
        if not whole.cudagraph_mode:
            return whole  # It holds no graphs, of any block.
        config = copy.copy(speculator.vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        most = config.compilation_config.max_cudagraph_capture_size
        requests = {*REQUESTS, speculator.max_num_reqs}
        config.compilation_config.cudagraph_capture_sizes = sorted(
            number * rows for number in requests if number * rows <= most
        )
        return type(whole)(config, speculator.device, whole.cudagraph_mode, decode_query_len=rows)

    def capture(self, speculator: Speculator, capture: Callable[[], None]) -> None:
        """Capture the passes of shorter blocks.

        Args:
            speculator: vLLM's, whose passes of whole blocks are captured already.
            capture: captures the passes that the speculator is laid out for.
        """
        graphs = speculator.short_cudagraph_manager
        if graphs is speculator.query_cudagraph_manager:
            return
        before, _ = torch.cuda.mem_get_info(speculator.device)
        with self.laid_out(speculator):
            capture()
        after, _ = torch.cuda.mem_get_info(speculator.device)
        logger.info(
            "%d draft passes of blocks of %d rows take %.2f GiB",
            len(graphs.graphs), self.rows, (before - after) / 2**30,
        )  # fmt: skip
