"""Attention back ends and CUDA graphs for verify passes of fewer rows than a block.

SGLang fixes the rows per request of a back end and of its graphs when it makes them. So there is
one back end and one set of graphs for each verify length, and a pass swaps its own in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dflash_plugin.kernels.draft_attention import Blocks
from dflash_plugin.sglang import triton_attention
from dflash_plugin.sglang.protocols import AttnBackendLike, GraphRunnerLike, ModelRunnerLike
from dflash_plugin.sglang.surface import is_instance

# Replays of a captured pass that are timed together.
TIMED_REPLAYS = 3

logger = logging.getLogger(__name__)


@dataclass
class VerifyPass:
    """The target's verify pass of one verify length.

    Attributes:
        backend: SGLang's attention back end for this verify length.
        graphs: SGLang's runner of captured passes, by number of requests.
        attention: which attention the passes use, None where that is the back end's own.
        starts: int32 [size + 1], the first row of each request, and the end of the last.
        requests: int32 [size * verify_len], the request of each row.
    """

    backend: AttnBackendLike
    graphs: GraphRunnerLike
    attention: triton_attention.VerifyAttention | None
    starts: Tensor
    requests: Tensor


class VerifyGraphs:
    """The verify passes of fewer rows than a block, by verify length.

    Args:
        block: rows of a whole block.
        size: largest number of requests in a batch.
        device: of the target.
        ragged: capture passes whose requests may have different numbers of rows.

    Attributes:
        passes: by verify length; empty until ``capture``, and where graphs are off.
    """

    def __init__(self, block: int, size: int, device: torch.device, *, ragged: bool) -> None:
        self.block, self.size, self.device, self.ragged = block, size, device, ragged
        self.passes: dict[int, VerifyPass] = {}

    def capture(
        self,
        runner: ModelRunnerLike,
        verify_lens: Sequence[int],
        agree: Callable[[int], int] | None,
    ) -> tuple[int, ...]:
        """Make back ends and graphs for the verify lengths below a whole block.

        They may take half of the memory that is free. Verify lengths that do not fit are left out,
        except for the longest.

        Args:
            runner: the target's, whose passes of whole blocks are captured already.
            verify_lens: rising.
            agree: gives all ranks the first rank's answer, or None where there is one rank.

        Returns:
            The verify lengths that can be used.
        """
        whole = runner.decode_cuda_graph_runner
        kept, reserve = runner.init_new_workspace, free_memory(self.device) / 2
        longest = verify_lens[-1]

        def has_room() -> bool:
            fits = free_memory(self.device) >= reserve
            return fits if agree is None else bool(agree(fits))

        try:
            for verify_len in verify_lens:
                if verify_len != self.block and (verify_len == longest or has_room()):
                    self.passes[verify_len] = self._capture(runner, type(whole), verify_len)
        finally:
            runner.init_new_workspace = kept
        captured = {*self.passes, longest}
        if missing := [length for length in verify_lens if length not in captured]:
            logger.warning("too little memory to verify %s rows of a block", missing)
        return tuple(length for length in verify_lens if length in captured)

    def _capture(
        self, runner: ModelRunnerLike, graph_runner: Callable[..., GraphRunnerLike], verify_len: int
    ) -> VerifyPass:
        backend = runner._get_attention_backend(init_new_workspace=True)
        share_kv_indices(runner.attn_backend, backend)
        starts, requests = self.even_rows(verify_len)
        attention = triton_attention.install(backend, self.device)
        if attention is not None and self.ragged and verify_len > 1:
            attention.blocks = Blocks(starts, requests, self.block)
        graphs = graph_runner(runner, attn_backend=backend, speculative_num_draft_tokens=verify_len)
        return VerifyPass(backend, graphs, attention, starts, requests)

    def even_rows(self, verify_len: int) -> tuple[Tensor, Tensor]:
        """``VerifyPass``'s starts and requests, where each request has ``verify_len`` rows."""
        starts = torch.arange(self.size + 1, dtype=torch.int32, device=self.device) * verify_len
        rows = torch.arange(self.size * verify_len, dtype=torch.int32, device=self.device)
        return starts, rows // verify_len

    def can_be_ragged(self) -> bool:
        """Whether every captured pass takes requests with different numbers of rows."""
        attentions = [made.attention for length, made in self.passes.items() if length > 1]
        return self.ragged and all(a is not None and a.only_ours for a in attentions)

    @contextmanager
    def swapped_in(self, runner: ModelRunnerLike, verify_len: int) -> Iterator[None]:
        """Run the target with the back end and graphs of a verify length, if it has its own."""
        own = self.passes.get(verify_len)
        if own is None:
            yield
            return
        kept = runner.attn_backend, runner.decode_cuda_graph_runner
        runner.attn_backend, runner.decode_cuda_graph_runner = own.backend, own.graphs
        try:
            yield
        finally:
            runner.attn_backend, runner.decode_cuda_graph_runner = kept


def free_memory(device: torch.device) -> float:
    """Free bytes of a GPU; infinite on another device."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return float(free)


def share_kv_indices(whole: AttnBackendLike, backend: AttnBackendLike) -> None:
    """Let a back end write the slots of its captured passes to another back end's buffer.

    The Triton back end's buffer holds the longest context of every row, and no two passes run at
    the same time.

    Args:
        whole: the target's back end for whole blocks, whose buffer has been made.
        backend: one for fewer rows, whose buffer has not been made.
    """
    if not is_instance(whole, triton_attention.BACKEND):
        return
    # Layers with a window would get a second buffer as large as the first.
    if (backend.sliding_window_size or 0) <= 0:
        native = backend.init_cuda_graph_state
        backend.init_cuda_graph_state = partial(native, kv_indices_buf=whole.cuda_graph_kv_indices)


def graph_seconds(runner: GraphRunnerLike | None, device: torch.device) -> dict[int, float]:
    """Seconds of each captured pass, by number of requests.

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
    found = {}
    for key, graph in backend._graphs.items():
        if is_instance(key, "ShapeKey"):
            graph.replay()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(TIMED_REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            found[int(key.size)] = begin.elapsed_time(end) / TIMED_REPLAYS / 1e3
    return found
