"""Verify passes of a part of what was drafted, where a policy says that they commit more a second.

SGLang's worker drafts and commits whole blocks. Between the two, the input of the target's pass is
cut to the rows that are verified, and its output laid out like whole blocks again, with drafts that
no token equals where none was verified. How many rows a request has on average is one number for a
step, for which there is attention metadata and a graph; which ones they are is decided on the
device, by how probably each draft stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dflash_plugin.adaptive.policy import VerifyLenPolicy
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.cut_blocks import CutBlocks, cut_blocks
from dflash_plugin.kernels.draft_attention import Blocks
from dflash_plugin.serving.adaptive_setup import DraftSelection, make_policy
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.sglang import triton_attention
from dflash_plugin.sglang.acceptance_probs import AcceptancePredictor
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.options import DrafterSpec

# Parts of a batch that run in other processes than its rest, or rows that are added to it.
LIMITS = (
    ("pp_size", 1),
    ("dp_size", 1),
    ("attn_cp_size", 1),
    ("dcp_size", 1),
    ("enable_two_batch_overlap", False),
)
# With no more requests than these there is little to save.
FEW = 8
# Of a captured pass, to time it.
REPLAYS = 3

logger = logging.getLogger(__name__)


@dataclass
class Pass:
    """The target's verify pass of so many rows a request.

    Attributes:
        backend: SGLang's of its attention.
        graphs: of it, by requests.
        attention: which attention it uses, None where that is the back end's own.
        starts: int32 [size + 1], where each request's rows begin.
        requests: int32 [size * rows], whose each row is.
    """

    backend: Any
    graphs: Any
    attention: triton_attention.Passes | None
    starts: Tensor
    requests: Tensor


class AdaptiveVerifier:
    """How many rows of a block are verified, now and by policy.

    Args:
        policy: chooses.
        block: rows of a whole block.
        size: requests of a batch, at most.
        device: of the target.
        options: limits of the number of drafts.
        by_request: requests may have different numbers of rows, where the target's attention is
            this project's.

    Attributes:
        chosen: rows that a request has on average in the pass that runs.
        held: verify whole blocks, whatever the policy says.
        unasked: the options leave it open whether passes are cut, so that without graphs they are
            not.
        by_request: requests have different numbers of rows.
        passes: those of fewer rows than a block.
        attention: which one the target's other passes use, None where that is its back end's own.
        cut: what the pass that runs verifies, once it has drafted; None for whole blocks.
    """

    def __init__(
        self,
        policy: VerifyLenPolicy,
        block: int,
        size: int,
        device: torch.device,
        options: Options,
        *,
        by_request: bool = True,
    ) -> None:
        self.policy, self.block, self.device = policy, block, device
        self.chosen, self.held = block, False
        self.passes: dict[int, Pass] = {}
        self.attention: triton_attention.Passes | None = None
        self.cut: CutBlocks | None = None
        self.chances = AcceptancePredictor(block - 1, size, device)
        self.selection = DraftSelection(options, block - 1, size, device)
        self._wanted, self.by_request = by_request, False
        self.unasked = options.adaptive_verification is None
        self._starts: Tensor | None = None
        counts = torch.ones(3, size, dtype=torch.int32, device=device)
        self._drafts, self._others, self._admitted = counts.unbind()
        self._drafts.fill_(block - 1)
        self._slots = torch.arange(size, device=device)
        self._logit_starts = torch.zeros(size + 1, dtype=torch.int32, device=device)
        if device.type == "cpu":  # Its attention takes blocks of any length.
            self._share_out(by_request)

    @property
    def skips_draft(self) -> bool:
        """Whether the pass that runs verifies no draft, so that it needs none."""
        return self.chosen == 1

    def capture(self, runner: Any, drafting: Any) -> None:
        """Graphs of the target's verify passes of every width, and what each takes.

        They may take half of the memory that is free; widths for which that is too little are not
        used.

        Args:
            runner: SGLang's of the target, whose graphs of whole blocks are captured.
            drafting: SGLang's of the drafter, likewise.
        """
        whole = getattr(runner, "decode_cuda_graph_runner", None)
        if whole is None:
            self.held = self.unasked
            return
        self.policy.sizes = tuple(sorted(whole.capture_bs))
        kept, least = runner.init_new_workspace, free_memory(self.device) / 2
        widest = self.policy.widths[-1]
        try:
            for width in self.policy.widths:
                if width != self.block and (width == widest or self._has_room(least)):
                    self.passes[width] = self._capture(runner, type(whole), width)
        finally:
            runner.init_new_workspace = kept
        captured = {*self.passes, widest}
        if missing := [width for width in self.policy.widths if width not in captured]:
            logger.warning("too little memory to verify %s rows of a block", missing)
            self.policy.widths = tuple(w for w in self.policy.widths if w in captured)
        uneven = [made.attention for width, made in self.passes.items() if width > 1]
        self._share_out(self._wanted and all(found is not None and found.alone for found in uneven))
        if self.by_request:
            self.selection.compile_ahead(self.chances.predictions)
        draft = graph_seconds(getattr(drafting, "decode_cuda_graph_runner", None), self.device)
        for width in self.policy.widths:
            graphs = self.passes[width].graphs if width in self.passes else whole
            for size, seconds in graph_seconds(graphs, self.device).items():
                if width == 1 or size in draft:
                    drafts = draft[size] if width > 1 else 0.0
                    self.policy.prior[size, width] = seconds + drafts

    def _has_room(self, least: float) -> bool:
        has_room, agree = free_memory(self.device) >= least, self.policy.agree
        return has_room if agree is None else bool(agree(has_room))

    def _capture(self, runner: Any, graphs: Any, width: int) -> Pass:
        backend = runner._get_attention_backend(init_new_workspace=True)
        share_lists(runner.attn_backend, backend)
        starts, requests = self._evenly(width)
        attention = triton_attention.install(backend, self.device)
        if attention is not None and self._wanted and width > 1:
            attention.blocks = Blocks(starts, requests, self.block)
        made = graphs(runner, attn_backend=backend, speculative_num_draft_tokens=width)
        return Pass(backend, made, attention, starts, requests)

    def _evenly(self, width: int) -> tuple[Tensor, Tensor]:
        """``Pass``'s starts and requests, of requests that have as many rows each."""
        size = len(self._slots)
        starts = torch.arange(size + 1, dtype=torch.int32, device=self.device) * width
        rows = torch.arange(size * width, dtype=torch.int32, device=self.device)
        return starts, rows // width

    def _share_out(self, by_request: bool) -> None:
        self.by_request = by_request
        self.policy.expected = self._expected if by_request else self.policy.acceptance.expected

    def _expected(self) -> list[float]:
        return self.selection.expected(lambda rows: rows - 1)

    @contextmanager
    def verifying(self, worker: Any, batch: Any) -> Iterator[None]:
        """A decode pass.

        Args:
            worker: SGLang's.
            batch: SGLang's; one that wants log-probabilities gets whole blocks, by which SGLang
                finds them.
        """
        self.chosen = self.block
        # A grammar reads the drafts where they are, which on a GPU it has copied by then.
        reads = self.device.type == "cpu" and getattr(batch, "has_grammar", False)
        if self.held or batch.return_logprob or reads:
            self.policy.interrupt()
        else:
            self.chosen = self.policy.choose(len(batch.reqs), time.monotonic())
        runner = worker.target_worker.model_runner
        own = self.passes.get(self.chosen)
        kept = runner.attn_backend, runner.decode_cuda_graph_runner
        try:
            if own is not None:
                runner.attn_backend, runner.decode_cuda_graph_runner = own.backend, own.graphs
            yield
        finally:
            self.cut, self._starts = None, None
            self.chosen = self.block
            if own is not None:
                runner.attn_backend, runner.decode_cuda_graph_runner = kept
                if own.attention is not None:
                    own.attention.uneven = False
            elif self.attention is not None:
                self.attention.blocks, self.attention.uneven = None, False

    def narrow(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> CutBlocks:
        """The rows that the target's pass has.

        Args:
            tokens: int64 [B * block], anchors and drafts.
            positions: [B * block].
            slots: [B * block], where keys and values are written.
        """
        batch = len(tokens) // self.block
        own = self.passes.get(self.chosen)
        starts, requests = self._evenly(self.chosen) if own is None else (own.starts, own.requests)
        even = not self.by_request or self.chosen == 1
        self._starts = starts[: batch + 1]
        if not even:
            self.selection.admit(
                self.chances.predictions,
                self._slots[:batch],
                self._drafts[:batch],
                self._others[:batch],
                batch * (self.chosen - 1),
                self._admitted[:batch],
                self._logit_starts,
                self._starts,
            )
            attention = self.attention if own is None else own.attention
            if attention is not None:
                attention.blocks = Blocks(starts, requests, self.block)
                attention.uneven = True
        self.cut = cut_blocks(
            tokens.view(batch, self.block),
            positions.contiguous(),
            slots.contiguous(),
            self.chosen,
            starts,
            requests,
            even=even,
        )
        return self.cut

    def row_counts(self) -> list[int]:
        """Rows of each request in the pass that runs, read back to the host."""
        assert self._starts is not None
        counts: list[int] = self._starts.diff().tolist()
        return counts

    def widen(self, output: Any, tokens: Tensor, *, features: bool) -> None:
        """Lay the output of the target's pass out like that of whole blocks.

        Args:
            output: SGLang's ``LogitsProcessorOutput``.
            tokens: int64 [at least B, block], the worker's; drafts that were not verified become
                -1, which nothing equals.
            features: the hidden states are still to be read.
        """
        cut = self.cut
        if cut is None:
            return
        if output.next_token_logits is not None:
            output.next_token_logits = output.next_token_logits[cut.indices]
        hidden = output.hidden_states
        if hidden is not None:
            whole = len(cut.indices), *hidden.shape[1:]
            output.hidden_states = hidden[cut.indices] if features else hidden[:1].expand(whole)
        tokens[: len(cut.kept)].copy_(cut.kept)

    def learn(self, committed: Tensor) -> None:
        """Learn from what a pass committed, int [B]."""
        if self.skips_draft or not self.by_request:
            return
        self.chances.learn(committed, self._starts)
        self.selection.observe(lambda: self.chances.predictions[: len(committed)])


def free_memory(device: torch.device) -> float:
    """Bytes; where it is no GPU's, more than anything takes."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return float(free)


def share_lists(whole: Any, backend: Any) -> None:
    """Let a back end list the slots of a captured pass where another one does.

    Those lists hold every position of the longest context for every row, and no two passes run at
    once.

    Args:
        whole: SGLang's of the target's passes of whole blocks, whose lists have been made.
        backend: one for fewer rows, before its own are.
    """
    lists = getattr(whole, "cuda_graph_kv_indices", None)
    # Where layers have a window, a second list would be made as long as the first.
    windowed = (getattr(backend, "sliding_window_size", None) or 0) > 0
    if lists is not None and not windowed:
        native = backend.init_cuda_graph_state
        backend.init_cuda_graph_state = partial(native, kv_indices_buf=lists)


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


def agreement(group: Any) -> Callable[[int], int] | None:
    """``VerifyLenPolicy``'s agree for tensor-parallel ranks: the first one's clock decides.

    Args:
        group: SGLang's, of the ranks.
    """
    if group.world_size == 1:
        return None

    def agree(width: int) -> int:
        chosen = torch.tensor([width], device="cpu")
        # Between the hosts, so that nothing waits for a device.
        dist.broadcast(chosen, group.ranks[0], group.cpu_group)
        return int(chosen)

    return agree


def widths_of(
    info: DrafterSpec,
    runner: Any,
    block: int,
    device: torch.device,
    attention: triton_attention.Passes | None,
    *,
    agree: Callable[[int], int] | None = None,
    keeps_state: bool = False,
) -> AdaptiveVerifier | None:
    """As the options ask for them, or None where every pass verifies whole blocks.

    Left open, they do where the server's settings allow it and it was measured to pay.

    Args:
        info: the drafter, with its options.
        runner: SGLang's of the target, with its request pool.
        block: rows of a whole block.
        device: where it runs.
        attention: which one its passes use, None where that is its back end's own.
        agree: ``agreement`` of the ranks.
        keeps_state: the target keeps state that a shorter pass would leave behind.

    Raises:
        DFlashError: it is asked for, and the server's settings or the limits do not allow it.
    """
    options, server_args = info.options, runner.server_args
    if options.adaptive_verification is False:
        return None
    # Both lay out what they need by requests that have as many rows each.
    alike = argument(server_args, "enable_lora") or getattr(
        runner.model_config, "model_is_mrope", False
    )
    size = int(runner.req_to_token_pool.size)
    obstacle = _obstacle(server_args, keeps_state)
    if options.adaptive_verification is None:
        if attention is None or alike:
            obstacle = obstacle or "requests cannot differ in how many drafts are verified"
        if agree is not None:
            obstacle = obstacle or "it was not measured on several ranks"
        if size <= FEW:
            obstacle = obstacle or f"no more than {size} requests run at once"
        if obstacle is not None:
            logger.info("adaptive verification is off: %s", obstacle)
            return None
    elif obstacle is not None:
        raise DFlashError(
            f"adaptive_verification is on, but {obstacle}, or turn adaptive_verification off"
        )
    made = AdaptiveVerifier(
        make_policy(options, block - 1, agree=agree),
        block,
        size,
        device,
        options,
        by_request=not alike,
    )
    made.attention = attention
    return made


def _obstacle(server_args: Any, keeps_state: bool) -> str | None:
    """What keeps passes from being cut, and what to do about it."""
    for name, needed in LIMITS:
        given = argument(server_args, name)
        if given not in (None, needed):
            return f"{name} is {given!r}: set it to {needed!r}"
    if keeps_state:
        return "the target keeps state that a shorter pass would leave behind: use another target"
    return None


def route_inputs(module: Any, current: Any) -> None:
    """Let the input of a verify pass be cut while a worker's pass runs.

    Args:
        module: with SGLang's worker and the name of the input's class.
        current: gives the worker whose pass runs, or None.
    """
    native: Any = module.DFlashVerifyInput

    def cutting() -> AdaptiveVerifier | None:
        worker = current()
        widths: AdaptiveVerifier | None = None if worker is None else worker.widths
        return None if widths is None or widths.chosen == widths.block else widths

    class CutInput(native):
        """SGLang's, with what was made for whole blocks cut."""

        draft_token: Tensor
        positions: Tensor

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            widths = cutting()
            if widths is not None:
                kwargs["draft_token_num"] = widths.chosen
            super().__init__(*args, **kwargs)

        def prepare_for_verify(
            self, batch: Any, target_worker: Any, *args: Any, **kwargs: Any
        ) -> Any:
            widths = cutting()
            if widths is not None:
                cut = widths.narrow(self.draft_token, self.positions, batch.out_cache_loc)
                self.draft_token, self.positions = cut.tokens, cut.positions
                batch.out_cache_loc = cut.slots
                if widths.device.type == "cpu":
                    self.row_counts = widths.row_counts()
                whole = getattr(self, "kv_loc_plan", None)
                if whole is not None:  # From 0.5.23 on, what the pass writes is planned ahead.
                    translator = target_worker.model_runner.kv_index_translator
                    self.kv_loc_plan = translator.plan(
                        req_pool_indices=whole.req_pool_indices,
                        seq_lens=whole.seq_lens,
                        seq_lens_cpu=whole.seq_lens_cpu,
                        write_virtual=batch.out_cache_loc,
                        read_extent=widths.block if widths.by_request else widths.chosen,
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
