"""Verify passes of fewer rows than a block has, where a policy says that they commit more a second.

SGLang's worker drafts, verifies and commits with one block size. Once a pass has drafted its whole
block, the worker is told that a block has the rows that are to be verified; what it has at hand for
a whole block by then is cut. Each number of rows has attention metadata and graphs of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dflash_plugin.budget.width import WidthPolicy, choose_widths
from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang import block_attention
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.options import Hosted

# What has to be decided alike by processes that have no clock in common, or adds rows of its own.
LIMITS = (
    ("tp_size", 1),
    ("pp_size", 1),
    ("dp_size", 1),
    ("enable_two_batch_overlap", False),
)
# Of a captured pass, to time it.
REPLAYS = 3


class Widths:
    """How many rows of a block are verified, now and by policy.

    Args:
        policy: chooses.
        block: rows of a whole block.

    Attributes:
        rows: of a block, as the worker is told.
        chosen: rows that the pass which runs verifies.
        held: verify whole blocks, whatever the policy says.
        passes: attention back end and graphs of the target, by rows.
    """

    def __init__(self, policy: WidthPolicy, block: int) -> None:
        self.policy, self.block = policy, block
        self.rows = block
        self.chosen = block
        self.held = False
        self.passes: dict[int, tuple[Any, Any]] = {}
        self._buffers: dict[int, Tensor] = {}
        self._whole_tokens: Any = None

    @property
    def narrowed(self) -> bool:
        """Whether the pass that runs has been cut."""
        return self.rows != self.block

    @property
    def skips_draft(self) -> bool:
        """Whether the pass that runs verifies no draft, so that it needs none."""
        return self.chosen == 1

    def capture(self, runner: Any, drafting: Any, device: torch.device) -> None:
        """Graphs of the target's verify passes of every width, and what each takes.

        Args:
            runner: SGLang's of the target, whose graphs of whole blocks are captured.
            drafting: SGLang's of the drafter, likewise.
            device: where they run.
        """
        whole = getattr(runner, "decode_cuda_graph_runner", None)
        if whole is None:
            return
        self.policy.sizes = tuple(sorted(whole.capture_bs))
        kept = runner.init_new_workspace
        try:
            for width in self.policy.widths:
                if width != self.block:
                    backend = runner._get_attention_backend(init_new_workspace=True)
                    block_attention.install(backend, device)
                    graphs = type(whole)(
                        runner, attn_backend=backend, speculative_num_draft_tokens=width
                    )
                    self.passes[width] = backend, graphs
        finally:
            runner.init_new_workspace = kept
        draft = graph_seconds(getattr(drafting, "decode_cuda_graph_runner", None), device)
        for width in self.policy.widths:
            graphs = self.passes[width][1] if width in self.passes else whole
            for size, seconds in graph_seconds(graphs, device).items():
                if width == 1 or size in draft:
                    drafts = draft[size] if width > 1 else 0.0
                    self.policy.prior[size, width] = seconds + drafts

    @contextmanager
    def verifying(self, worker: Any, batch: Any) -> Iterator[None]:
        """A decode pass.

        Args:
            worker: SGLang's; its buffer of block tokens is put back afterwards.
            batch: SGLang's; one that wants log-probabilities gets whole blocks, by which SGLang
                finds them.
        """
        self.chosen = self.block
        if self.held or batch.return_logprob:
            self.policy.interrupt()
        else:
            self.chosen = self.policy.choose(len(batch.reqs), time.monotonic())
        runner = worker.target_worker.model_runner
        own = self.passes.get(self.chosen)
        kept = runner.attn_backend, runner.decode_cuda_graph_runner
        try:
            if own is not None:
                runner.attn_backend, runner.decode_cuda_graph_runner = own
            yield
        finally:
            if self.narrowed:
                worker._draft_block_tokens_buf = self._whole_tokens
                self.rows = self.block
            self.chosen = self.block
            if own is not None:
                runner.attn_backend, runner.decode_cuda_graph_runner = kept

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A part of a pass in which a block has all of its rows."""
        rows, self.rows = self.rows, self.block
        try:
            yield
        finally:
            self.rows = rows

    def narrow(self, worker: Any, drafts: Tensor, requests: int) -> Tensor:
        """From here on, a block has the chosen rows.

        Args:
            worker: SGLang's; gets a buffer of block tokens of that width.
            drafts: int64 [at least B * K], of whole blocks.
            requests: B.

        Returns:
            Drafts int64 of the chosen rows, flat.
        """
        if self.chosen == self.block or self.narrowed:
            return drafts
        self._whole_tokens = worker._draft_block_tokens_buf
        buffer = self._buffers.get(self.chosen)
        if buffer is None or len(buffer) < len(self._whole_tokens):
            buffer = self._whole_tokens.new_zeros(len(self._whole_tokens), self.chosen)
            self._buffers[self.chosen] = buffer
        worker._draft_block_tokens_buf = buffer
        self.rows = self.chosen
        count = self.block - 1
        by_request = drafts[: requests * count].view(requests, count)
        return by_request[:, : self.rows - 1].flatten().contiguous()

    def cut(self, values: Tensor) -> Tensor:
        """The rows that are verified, of values [B * block, ...] of whole blocks."""
        if not self.narrowed:
            return values
        by_request: Tensor = values.view(-1, self.block, *values.shape[1:])
        # A view of one row each would keep the others' places between.
        return by_request[:, : self.rows].flatten(0, 1).contiguous()


def graph_seconds(runner: Any, device: torch.device) -> dict[int, float]:
    """What captured passes take, by requests; nothing where they cannot be replayed by themselves.

    Args:
        runner: SGLang's of captured passes, whose inputs are still those of the capture.
        device: where it runs.
    """
    kept = getattr(getattr(runner, "backend", None), "_graphs", None)
    if device.type != "cuda" or not isinstance(kept, dict):
        return {}
    found = {}
    for key, graph in kept.items():
        if hasattr(graph, "replay") and hasattr(key, "size"):
            graph.replay()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            found[int(key.size)] = begin.elapsed_time(end) / REPLAYS / 1e3
    return found


def widths_of(info: Hosted, server_args: Any, block: int) -> Widths | None:
    """As the options ask for them, or None where every pass verifies whole blocks.

    Args:
        info: the drafter, with its options.
        server_args: SGLang's ``ServerArgs``.
        block: rows of a whole block.

    Raises:
        DFlashError: the server's settings or the limits do not allow it.
    """
    options = info.options
    if not options.adaptive_verification:
        return None
    for name, needed in LIMITS:
        given = argument(server_args, name)
        if given not in (None, needed):
            raise DFlashError(
                f"adaptive_verification is on, but {name} is {given!r}: set it to {needed!r}, or "
                "turn adaptive_verification off"
            )
    widths = choose_widths(block, options.min_draft_tokens, options.max_draft_tokens)
    return Widths(WidthPolicy(widths, latency_vs_throughput=options.latency_vs_throughput), block)


def route_inputs(module: Any, current: Any) -> None:
    """Let the input of a verify pass be cut while a worker's pass runs.

    Args:
        module: with SGLang's worker and the name of the input's class.
        current: gives the worker whose pass runs, or None.
    """
    native: Any = module.DFlashVerifyInput

    def widths() -> Widths | None:
        worker = current()
        return None if worker is None else worker.widths

    class CutInput(native):
        """SGLang's, with what was made for whole blocks cut."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            cutting = widths()
            if cutting is not None and cutting.narrowed:
                kwargs["positions"] = cutting.cut(kwargs["positions"])
            super().__init__(*args, **kwargs)

        def prepare_for_verify(
            self, batch: Any, target_worker: Any, *args: Any, **kwargs: Any
        ) -> Any:
            cutting = widths()
            if cutting is not None and cutting.narrowed:
                batch.out_cache_loc = cutting.cut(batch.out_cache_loc)
                whole = getattr(self, "kv_loc_plan", None)
                if whole is not None:  # From 0.5.23 on, what the pass writes is planned ahead.
                    translator = target_worker.model_runner.kv_index_translator
                    self.kv_loc_plan = translator.plan(
                        req_pool_indices=whole.req_pool_indices,
                        seq_lens=whole.seq_lens,
                        seq_lens_cpu=whole.seq_lens_cpu,
                        write_virtual=batch.out_cache_loc,
                        read_extent=cutting.rows,
                    )
            return super().prepare_for_verify(batch, target_worker, *args, **kwargs)

    CutInput.__name__ = CutInput.__qualname__ = native.__name__
    module.DFlashVerifyInput = CutInput


def skipping(native: Any, worker: Any) -> Any:
    """A draft runner's ``forward`` that runs nothing where no draft is verified.

    Args:
        native: SGLang's own.
        worker: whose pass it is.
    """

    def forward(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        widths = worker.widths
        if widths is None or worker.step is None or not widths.skips_draft:
            return native(forward_batch, *args, **kwargs)
        nothing = forward_batch.positions.new_zeros(len(forward_batch.positions), 1)
        return SimpleNamespace(
            logits_output=SimpleNamespace(hidden_states=nothing), can_run_graph=True
        )

    return forward
