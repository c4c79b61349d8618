"""Draft passes of shorter blocks, for steps that verify few drafts of each request.

SGLang's worker prepares a draft pass of whole blocks, and reads as many drafts. In between,
``ShortBlocks`` runs the first rows of each block alone: what is left out of a block are mask tokens
at its end, so that the rest is a block as the drafter knows it. Drafts that were not made are 0 and
are never verified: such steps are cut (``adaptive``).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin.sglang.compat import current
from dflash_plugin.sglang.protocols import ForwardBatchLike, GraphRunnerLike, ModelRunnerLike
from dflash_plugin.sglang.verify_graphs import free_memory, keeping_metadata

logger = logging.getLogger(__name__)


class BlockModel(Protocol):
    """The draft model, as far as ``ShortBlocks`` touches it."""

    block_size: int

    def set_block_size(self, block_size: int) -> None:
        """Take the rows of a block."""
        ...


class ShortBlocks:
    """Runs draft passes over the first rows of each block.

    Args:
        rows: of a shorter block, the anchor included.
        block: rows of a whole block.
        runner: of the drafter.
        model: the drafter's.

    Attributes:
        graphs: SGLang's runner of the captured passes; None where passes run eagerly.
    """

    def __init__(self, rows: int, block: int, runner: ModelRunnerLike, model: BlockModel) -> None:
        self.rows, self.block, self.runner, self.model = rows, block, runner, model
        self.graphs: GraphRunnerLike | None = None
        self._spec_info: Any = None

    def capture(self, above: int) -> None:
        """Capture passes, for as many requests as those of whole blocks.

        Args:
            above: passes of no more requests than these are left out, if others remain.
        """
        whole, before = self.runner.decode_cuda_graph_runner, free_memory(self._device)
        backend = self.runner.attn_backend
        make = runner_of_sizes(type(whole), above)
        with self._sized(), keeping_metadata(backend):
            made = make(self.runner, attn_backend=backend, speculative_num_draft_tokens=self.rows)
        self.graphs = made
        taken = before - free_memory(self._device)
        if self._device.type == "cuda":
            logger.info(
                "draft passes of %d rows a request, for %s requests, take %.2f GiB",
                self.rows,
                list(made.capture_bs),
                taken / 2**30,
            )

    def run(
        self, forward: Callable[..., Any], batch: ForwardBatchLike, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a draft pass that SGLang's worker has prepared for whole blocks.

        Args:
            forward: of the drafter's runner.
            batch: of the pass; it is cut.
            args: further arguments of ``forward``.
            kwargs: likewise.
        """
        requests = batch.batch_size
        self._cut(batch)
        kept = self.runner.decode_cuda_graph_runner
        if self.graphs is not None:
            self.runner.decode_cuda_graph_runner = self.graphs
        try:
            with self._sized():
                out = forward(batch, *args, **kwargs)
        finally:
            self.runner.decode_cuda_graph_runner = kept
        hidden = out.logits_output.hidden_states
        if hidden is not None and not out.can_run_graph:
            whole = self._padded(hidden, requests, self.rows, self.block)
            out.logits_output.hidden_states = whole
        return out

    def whole_drafts(self, tokens: Tensor, requests: int) -> Tensor:
        """Drafts int64 [B * (block - 1)], of which only the first of each request were made.

        Args:
            tokens: int64 [at least B * (rows - 1)], those that were made.
            requests: B.
        """
        made = self.rows - 1
        return self._padded(tokens[: requests * made], requests, made, self.block - 1)

    def made_rows(self, hidden: Tensor) -> Tensor:
        """The rows [B * (rows - 1), …] that draft, of [B * (block - 1), …] of whole blocks."""
        by_request = hidden.unflatten(0, (-1, self.block - 1))
        made: Tensor = by_request[:, : self.rows - 1].flatten(0, 1)
        return made

    @property
    def _device(self) -> torch.device:
        return torch.device(self.runner.device)

    @contextmanager
    def _sized(self) -> Iterator[None]:
        """Let the draft model take blocks of so few rows."""
        kept = self.model.block_size
        self.model.set_block_size(self.rows)
        try:
            yield
        finally:
            self.model.set_block_size(kept)

    def _cut(self, batch: Any) -> None:
        """Leave the first rows of each block in a batch."""
        requests, rows = batch.batch_size, batch.batch_size * self.rows
        for name in ("input_ids", "positions", "out_cache_loc"):
            setattr(batch, name, self._first_rows(getattr(batch, name), requests))
        batch.spec_info = self._info_of(batch.spec_info)
        if batch.num_token_non_padded is not None:
            batch.num_token_non_padded = torch.full_like(batch.num_token_non_padded, rows)
        if current().counts_rows_on_host:
            batch.global_num_token_non_padded_cpu = rows
        if current().plans_kv_writes and batch.kv_loc_plan is not None:
            translator = self.runner.kv_index_translator
            batch.kv_loc_plan.bind(batch, translator, cols=slice(0, self.rows))

    def _first_rows(self, values: Tensor, requests: int) -> Tensor:
        return values.view(requests, self.block)[:, : self.rows].reshape(-1)

    def _info_of(self, whole: Any) -> Any:
        """SGLang's description of the draft pass, which is the same object in every step."""
        if self._spec_info is None:
            self._spec_info = copy.copy(whole)
            for name in ("draft_token_num", "num_tokens_per_req", "num_tokens_for_logprob_per_req"):
                setattr(self._spec_info, name, self.rows)
        return self._spec_info

    def _padded(self, values: Tensor, requests: int, made: int, whole: int) -> Tensor:
        """Rows [B * made, …] with zeros behind each request's, [B * whole, …]."""
        by_request = values.view(requests, made, -1)
        padded = F.pad(by_request, (0, 0, 0, whole - made))
        return padded.view(requests * whole, *values.shape[1:])


def runner_of_sizes(native: Any, above: int) -> Callable[..., Any]:
    """A subclass of SGLang's runner that captures passes of many requests alone.

    Args:
        native: SGLang's class.
        above: no passes of no more requests than these, if others remain.
    """

    class LargeBatches(native):
        """SGLang's, without passes of few requests."""

        capture_bs: list[int]

        def capture(self) -> None:
            self.capture_bs = [size for size in self.capture_bs if size > above] or self.capture_bs
            super().capture()

    return LargeBatches
