"""CUDA graphs for verify passes whose requests have different numbers of rows.

SGLang's runner of captured passes has such passes, by their number of rows, for another method:
its ragged verify mode. ``VerifyGraphs`` makes a second runner in that mode beside the target's own,
which keeps the passes of whole blocks. Where all attention is ``block_attention``'s, that reads the
rows of each request from a tensor, and both runners share the back end. Elsewhere the second runner
has a back end of its own, which takes the rows of each request from SGLang's layout; under
FlashAttention its passes of few rows use ``draft_attention``, which is faster there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from dflash_plugin.kernels.draft_attention import Blocks
from dflash_plugin.sglang import recurrent_verify
from dflash_plugin.sglang.block_attention import BlockAttention, install_for_cut_passes
from dflash_plugin.sglang.protocols import AttnBackendLike, GraphRunnerLike, ModelRunnerLike
from dflash_plugin.sglang.surface import is_instance, surface

RUNNER_MODULE = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
# Captured passes are timed in turns, each by some replays: what disturbs one turn, another program
# on the GPU for example, may be over in the next.
TIMED_TURNS, TIMED_REPLAYS = 2, 2
# Captured numbers of rows grow by this factor at least: more of them take longer to start.
GROWTH = 1.2
# Where they grow by more than this factor, and passes have so many rows that each costs, one
# between two of SGLang's is captured, too. On an H200 with Qwen3-8B's shape, the matrix products of
# 256, 320 and 384 rows take 6.7, 7.5 and 9.5 ms, those of 16 to 192 rows 4.2 to 5.3 ms.
WIDE, FREE_ROWS = 1.4, 192

logger = logging.getLogger(__name__)
# Whether the runner that is being made is ours.
_is_ragged: ContextVar[bool] = ContextVar("makes a ragged runner", default=False)


class VerifyGraphs:
    """The captured verify passes of fewer rows than whole blocks.

    Args:
        block: rows of a whole block.
        size: largest number of requests in a batch.
        device: of the target.

    Attributes:
        runner: SGLang's runner of these passes; None until ``capture``, and where graphs are off.
        keeps_state: the passes run over recurrent layers, with a back end of their own.
        starts: int32 [size + 1], the first row of each request of the pass, and the end of the
            last; captured passes read it.
        requests: int32 [size * block], the request of each row; captured passes read it.
    """

    def __init__(self, block: int, size: int, device: torch.device) -> None:
        self.block, self.size, self.device = block, size, device
        self.runner: Any = None
        self.keeps_state = False
        self.starts = torch.zeros(size + 1, dtype=torch.int32, device=device)
        self.requests = torch.zeros(size * block, dtype=torch.int32, device=device)

    @property
    def blocks(self) -> Blocks:
        """The rows of each request, as ``draft_attention`` takes them."""
        return Blocks(self.starts, self.requests, self.block)

    def capture(self, runner: ModelRunnerLike, attention: BlockAttention | None) -> list[int]:
        """Capture passes by their number of rows.

        Args:
            runner: the target's, whose passes of whole blocks are captured already.
            attention: of the target's back end, where all its passes so far are ours; None where
                the back end's own attention takes SGLang's layout.

        Returns:
            Rows of the captured passes, rising.
        """
        whole = runner.decode_cuda_graph_runner
        backend, used = runner.attn_backend, attention
        kept = runner.init_new_workspace
        before = free_memory(self.device)
        if attention is None:
            backend = runner._get_attention_backend(init_new_workspace=True)
            used = install_for_cut_passes(backend, runner, self.device, self.blocks)
            self.keeps_state = recurrent_verify.install(backend)
        token = _is_ragged.set(True)
        try:
            with shared(backend, attention, self.blocks):
                make = ragged_runner(type(whole), self, used)
                self.runner = make(runner, attn_backend=backend)
        finally:
            _is_ragged.reset(token)
            runner.init_new_workspace = kept
        rows = [int(number) for number in self.runner.capture_num_tokens]
        if self.device.type == "cuda":
            taken = before - free_memory(self.device)
            logger.info("verify passes of %s rows take %.2f GiB", rows, taken / 2**30)
        return rows

    def spread(self, verify_lens: list[int]) -> None:
        """Give each request of the pass that is captured next its number of rows."""
        counts = torch.tensor(verify_lens, dtype=torch.int32, device=self.device)
        total = int(sum(verify_lens))
        self.starts[1 : len(verify_lens) + 1] = counts.cumsum(0)
        self.starts[len(verify_lens) + 1 :] = total
        owners = torch.arange(len(verify_lens), dtype=torch.int32, device=self.device)
        self.requests[:total] = owners.repeat_interleave(counts)

    def layout(self, requests: int, rows: int) -> Any:
        """SGLang's layout of the pass that runs, of ``starts``.

        Args:
            requests: of the batch.
            rows: of the pass, as many as a captured one has.
        """
        from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout

        starts = self.starts[: requests + 1]
        return RaggedVerifyLayout(
            verify_lens=starts.diff(),
            graph_num_tokens=rows,
            extend_start_loc=starts[:-1],
            qo_indptr_device=starts,
            total_verify_tokens=rows,
        )

    @contextmanager
    def swapped_in(self, runner: ModelRunnerLike) -> Iterator[None]:
        """Let the target replay these passes instead of those of whole blocks, if there are any.

        Over recurrent layers their back end is the target's meanwhile: it knows which states the
        pass has left.
        """
        kept = runner.decode_cuda_graph_runner, runner.attn_backend
        if self.runner is not None:
            runner.decode_cuda_graph_runner = self.runner
        if self.keeps_state:
            runner.attn_backend = self.runner.attn_backend
        try:
            yield
        finally:
            runner.decode_cuda_graph_runner, runner.attn_backend = kept


def enable_ragged_runners() -> None:
    """Let a runner that ``VerifyGraphs`` makes have SGLang's ragged verify mode."""

    def make(native: Callable[..., bool]) -> Callable[..., bool]:
        def enabled(spec_algorithm: Any) -> bool:
            return _is_ragged.get() or native(spec_algorithm)

        return enabled

    surface().patch(RUNNER_MODULE, "ragged_verify_compact_graphs_enabled", make)


def ragged_runner(
    native: Any, graphs: VerifyGraphs, attention: BlockAttention | None
) -> Callable[..., Any]:
    """A subclass of SGLang's runner that captures few numbers of rows.

    Args:
        native: SGLang's class.
        graphs: holds the rows of each request.
        attention: of the runner's back end; what it replaces reads these rows instead of SGLang's
            layout.
    """

    class RaggedRunner(native):
        """SGLang's runner of captured passes, in its ragged verify mode."""

        capture_bs: list[int]
        _staged: Any = None

        def _build_ragged_verify_token_buckets(self) -> list[int]:
            self.capture_bs = spaced(self.capture_bs, graphs.block)
            buckets: list[int] = super()._build_ragged_verify_token_buckets()
            return buckets

        def _capture_ragged_verify_layout(self, num_tokens: int) -> Any:
            layout = super()._capture_ragged_verify_layout(num_tokens)
            graphs.spread(layout.verify_lens_cpu)
            return layout

        def _stage_ragged_verify_layout(self, ragged_layout: Any, graph_size_key: int) -> None:
            # SGLang calls it twice: when it plans a pass, and when it runs it.
            ours = attention is not None and attention.replaces(0, graph_size_key)
            if not ours and ragged_layout is not self._staged:
                super()._stage_ragged_verify_layout(ragged_layout, graph_size_key)
                self._staged = ragged_layout

    return RaggedRunner


def spaced(sizes: list[int], width: int) -> list[int]:
    """Sizes to capture of those that SGLang captures: fewer of the close ones, and some between.

    Each exceeds the one before by ``GROWTH``, but for the largest. Where they are further apart
    than ``WIDE`` and passes have ``FREE_ROWS`` rows or more, the one in the middle is added.

    Args:
        sizes: requests of whole blocks; multiples of what all ranks can share.
        width: rows of a block.
    """
    step = math.gcd(*sizes)
    kept: list[int] = []
    for size in sorted(sizes):
        last = kept[-1] if kept else 0
        if size < GROWTH * last:
            continue
        middle = (last + size) // 2
        if size > WIDE * last and last * width >= FREE_ROWS and middle % step == 0:
            kept.append(middle)
        kept.append(size)
    return kept if kept[-1] == max(sizes) else [*kept, max(sizes)]


@contextmanager
def shared(
    backend: AttnBackendLike, attention: BlockAttention | None, blocks: Blocks
) -> Iterator[None]:
    """Capture passes with a back end that another runner has captured with already.

    Its metadata stay that runner's: ``draft_attention`` reads none.

    Args:
        backend: the back end.
        attention: its attention, all ours; None where the back end is not shared.
        blocks: the rows of each request.
    """
    if attention is None:
        yield
        return
    backend.supports_ragged_verify_graph = True
    attention.blocks = blocks
    try:
        with keeping_metadata(backend):
            yield
    finally:
        attention.blocks = None


@contextmanager
def keeping_metadata(backend: AttnBackendLike) -> Iterator[None]:
    """Leave a back end's metadata as another runner of captured passes has made them."""
    names = ("init_cuda_graph_state", "init_forward_metadata_out_graph")
    kept = {name: vars(backend).get(name) for name in names}
    for name in names:
        setattr(backend, name, _nothing)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                delattr(backend, name)
            else:
                setattr(backend, name, value)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a method that fills what nothing reads."""


def free_memory(device: torch.device) -> float:
    """Free bytes of a GPU; infinite on another device."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return float(free)


def graph_seconds(runner: GraphRunnerLike | None, device: torch.device) -> dict[int, float]:
    """Seconds of each captured pass, by number of requests or, of a ragged runner, of rows.

    The shortest of some replays counts: another program on the GPU only makes them longer.

    Args:
        runner: SGLang's runner of captured passes, whose input buffers still hold what they held
            when it captured, so that a pass can be replayed by itself.
        device: of the runner.

    Returns:
        Empty where the runner holds no CUDA graphs of whole passes.
    """
    if device.type != "cuda" or not is_instance(runner, "DecodeCudaGraphRunner"):
        return {}
    assert runner is not None
    backend = runner.backend
    if not is_instance(backend, "FullCudaGraphBackend", "BreakableCudaGraphBackend"):
        return {}
    graphs = {
        int(key.size): graph
        for key, graph in backend._graphs.items()
        if is_instance(key, "ShapeKey")
    }
    found = dict.fromkeys(graphs, math.inf)
    for _ in range(TIMED_TURNS):
        for size, graph in graphs.items():
            graph.replay()
            took = min(_replay_seconds(graph) for _ in range(TIMED_REPLAYS))
            found[size] = min(found[size], took)
    return found


def _replay_seconds(graph: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
