"""Adaptive verification: which rows of each block the target verifies.

SGLang's worker drafts and commits whole blocks. The policy chooses the average rows of a request
(``VerifyBudget``), rounded up to a captured pass (``verify_graphs``). Which rows they are is
decided on the device, by the probability that each draft is accepted. ``verify_input`` compacts the
pass's input to these rows; its output stays compact (``CutPass``), and acceptance reads it so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.accept_greedy import accept_greedy
from dflash_plugin.kernels.cut_blocks import CutBlocks, cut_blocks
from dflash_plugin.serving.adaptive_setup import VerifyBudget, bypass_of, milliseconds
from dflash_plugin.sglang import block_attention, recurrent_verify
from dflash_plugin.sglang.acceptance_probs import AcceptancePredictor
from dflash_plugin.sglang.compat import argument, current
from dflash_plugin.sglang.options import DrafterSpec
from dflash_plugin.sglang.protocols import ModelRunnerLike, ScheduleBatchLike
from dflash_plugin.sglang.short_blocks import BlockModel, ShortBlocks
from dflash_plugin.sglang.surface import is_instance
from dflash_plugin.sglang.verify_graphs import VerifyGraphs, free_memory, graph_seconds

# Bytes of GPU memory that have to be free where verification adapts unasked; its graphs take half.
MIN_FREE = 2 << 30

# SGLang rounds captured batches up to a multiple of the ranks, beyond the largest that runs.
SIZE_MULTIPLE = 64

logger = logging.getLogger(__name__)


@dataclass
class CutPass:
    """A verify pass of fewer rows than whole blocks.

    Attributes:
        rows: the N rows that it verifies.
        logits: [N, V], of the target, once the pass has run; or this rank's part of them.
        hidden: [N, taps * hidden], the target's features, once the pass has run.
    """

    rows: CutBlocks
    logits: Tensor | None = None
    hidden: Tensor | None = None


class AdaptiveVerifier:
    """Chooses which rows of a batch's blocks a verify pass runs.

    Args:
        budget: how many drafts a step verifies.
        block: rows of a whole block.
        size: largest number of requests in a batch.
        device: of the target.
        by_request: requests may have different numbers of rows.
        is_optional: the options leave it open whether passes are cut.
        on_any_rank: whether something holds on one of the ranks of a step at least.

    Attributes:
        verify_len: rows of a request, on average, in the pass that runs.
        num_rows: rows of the pass that runs; None for whole blocks.
        draft_len: rows of a block, the anchor included, in the draft pass that runs.
        short: runs draft passes of shorter blocks; None where every pass drafts whole ones.
        whole_blocks: verify whole blocks, whatever the policy says.
        bypass: batches of no more requests than these verify whole blocks, and their drafts'
            acceptance is not predicted.
        graphs: the captured passes of fewer rows.
        attention: which attention the target's passes use, None where that is its back end's own.
        cut: the pass that runs, once it has drafted; None for whole blocks.
        predictor: how probably each draft is accepted.
    """

    def __init__(
        self,
        budget: VerifyBudget,
        block: int,
        size: int,
        device: torch.device,
        *,
        by_request: bool = True,
        is_optional: bool = False,
        on_any_rank: Callable[[bool], bool] = bool,
    ) -> None:
        self.budget, self.policy, self.selection = budget, budget.policy, budget.selection
        self.block, self.device = block, device
        self.by_request, self.is_optional = by_request, is_optional
        self.on_any_rank = on_any_rank
        self.verify_len, self.whole_blocks, self.bypass = block, False, 0
        self.num_rows: int | None = None
        self.draft_len = block
        self.short: ShortBlocks | None = None
        self.graphs = VerifyGraphs(block, size, device)
        self.attention: block_attention.BlockAttention | None = None
        self.cut: CutPass | None = None
        captured = -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE
        self.predictor = AcceptancePredictor(block - 1, captured, device)
        # Of the target's passes of whole blocks by requests, once they have been timed.
        self._whole_seconds: dict[int, float] = {}
        counts = torch.ones(3, size, dtype=torch.int32, device=device)
        self._drafts, self._others, self._admitted = counts.unbind()
        self._drafts.fill_(block - 1)
        self._slots = torch.arange(size, device=device)
        self._logit_starts = torch.zeros(size + 1, dtype=torch.int32, device=device)
        if not by_request:
            self.policy.expected = self.policy.acceptance.expected

    @property
    def skips_draft(self) -> bool:
        """Whether the pass that runs verifies no draft, so that it needs none."""
        return self.verify_len == 1

    @property
    def running_short(self) -> ShortBlocks | None:
        """``short``, where the draft pass that runs is of shorter blocks."""
        return self.short if self.draft_len < self.block else None

    def predicts(self, requests: int) -> bool:
        """Whether a batch's pass may be cut, so that its drafts' acceptance is predicted."""
        return not self.whole_blocks and requests > self.bypass

    def measure(self, runner: ModelRunnerLike) -> None:
        """Find the batches that gain nothing from shorter passes, before the drafter is captured.

        Args:
            runner: the target's, whose passes of whole blocks are captured already.

        Raises:
            DFlashError: the options ask for shorter passes, which a layer does not take.
        """
        obstacle = self._graph_obstacle(runner)
        if obstacle is not None:
            if not self.is_optional:
                raise DFlashError(
                    f"adaptive_verification is on, but {obstacle}, or turn adaptive_verification "
                    "off"
                )
            logger.warning("adaptive verification is off: %s", obstacle)
            self.whole_blocks = True
            return
        whole = runner.decode_cuda_graph_runner
        if self.policy.verify_lens[-1] < self.block:
            return
        seconds = self._whole_seconds = graph_seconds(whole, self.device)
        self.bypass = bypass_of(seconds)
        if self.policy.agree is not None:
            self.bypass = self.policy.agree(self.bypass)
        self.whole_blocks = bool(seconds) and self.bypass >= max(seconds)
        logger.info("verify passes of more than %d requests may be cut", self.bypass)

    def _graph_obstacle(self, runner: ModelRunnerLike) -> str | None:
        """What keeps passes of other rows from being captured, and what to do about it."""
        backend, attention = runner.attn_backend, self.attention
        if self.device.type != "cuda":
            return None
        if runner.decode_cuda_graph_runner is None:
            return "CUDA graphs are off: turn them on"
        if attention is not None and attention.only_ours:
            return None
        if not current().supports_ragged_verify(backend):
            full = recurrent_verify.full_attention_of(backend)
            return (
                f"{type(full).__name__}'s own attention takes whole blocks only: start SGLang "
                "with --attention-backend fa3"
            )
        return None

    def capture(self, runner: ModelRunnerLike, draft_runner: ModelRunnerLike) -> None:
        """Capture the target's verify passes of fewer rows, and time every pass.

        Args:
            runner: the target's, whose passes of whole blocks are captured already.
            draft_runner: the drafter's, whose passes are captured already.
        """
        whole, attention = runner.decode_cuda_graph_runner, self.attention
        if whole is None or self.whole_blocks:
            return
        free = free_memory(self.device)
        if self.is_optional and self.on_any_rank(free < MIN_FREE):
            logger.warning(
                "adaptive verification is off: %.1f GiB of GPU memory are free here, and its "
                "graphs need %.1f GiB on every rank: lower --mem-fraction-static",
                free / 2**30,
                MIN_FREE / 2**30,
            )
            self.whole_blocks = True
            return
        is_ours = attention is not None and attention.only_ours
        self.budget.capture_sizes = self.graphs.capture(runner, attention if is_ours else None)
        self.compile_ahead()
        verifying = graph_seconds(self.graphs.runner, self.device)
        drafting = graph_seconds(draft_runner.decode_cuda_graph_runner, self.device)
        if verifying and drafting:
            by_requests, short = self._whole_seconds or graph_seconds(whole, self.device), None
            if self.short is not None:
                short = graph_seconds(self.short.graphs, self.device)
            self.budget.set_costs(whole.capture_bs, verifying, drafting, by_requests, short)
            logger.info(
                "milliseconds of verify passes by rows: %s; of draft passes by requests: %s",
                milliseconds(verifying),
                milliseconds(drafting),
            )

    def draft_short_blocks(
        self,
        runner: ModelRunnerLike,
        model: BlockModel,
        attention: block_attention.BlockAttention | None,
    ) -> None:
        """Let steps that verify few drafts draft shorter blocks, where the drafter can.

        Args:
            runner: the drafter's, whose passes of whole blocks are captured already.
            model: the drafter's.
            attention: which attention its passes use, None where that is its back end's own, which
                may take blocks of one length only.
        """
        rows, graphs = self.budget.short, runner.decode_cuda_graph_runner
        if rows is None or self.whole_blocks or not self.by_request:
            return
        on_gpu = self.device.type == "cuda"
        if on_gpu and (attention is None or not attention.only_ours):
            logger.info("every draft pass drafts whole blocks: its attention is SGLang's own")
            return
        if on_gpu and not is_instance(graphs, "DecodeCudaGraphRunner"):
            return
        self.short = ShortBlocks(rows, self.block, runner, model)
        self.budget.draft_short_blocks()
        if on_gpu:
            with self._drafting(rows):
                self.short.capture(self.bypass)

    @contextmanager
    def _drafting(self, rows: int) -> Iterator[None]:
        self.draft_len = rows
        try:
            yield
        finally:
            self.draft_len = self.block

    def compile_ahead(self) -> None:
        """Run the launches of cut passes once, so that no request waits for their compilation."""
        self.selection.compile_ahead(self.predictor.predictions)
        block = torch.zeros(self.block, dtype=torch.int64, device=self.device)
        self.num_rows = 2
        try:
            cut = self.compact(block, block, block)
            accept_greedy(cut.kept[:, 1:], block[:2].clone(), cut.indices.view(1, self.block))
            self.predictor.compile_ahead(self.graphs.starts[:2])
        finally:
            self.num_rows, self.cut = None, None
            if self.attention is not None:
                self.attention.blocks, self.attention.ragged = None, False

    @contextmanager
    def verifying(self, worker: Any, batch: ScheduleBatchLike) -> Iterator[None]:
        """Choose the rows of a decode pass, and run the pass with them.

        Args:
            worker: SGLang's.
            batch: of the pass.
        """
        requests = len(batch.reqs)
        self.verify_len, self.num_rows = self.block, None
        if self._stays_whole(batch):
            self.policy.leave()
        else:
            self.budget.requests = requests
            verify_len = self.policy.choose(requests, time.monotonic())
            draft_len = self.policy.draft_len
            drafts = self.budget.drafts_to_verify(verify_len, requests, requests, draft_len)
            if drafts < requests * (self.block - 1):
                self.verify_len, self.draft_len = verify_len, draft_len
                # A pass of anchors alone fills a captured one too.
                self.num_rows = next(
                    (rows for rows in self.budget.capture_sizes if rows >= requests + drafts),
                    requests + drafts,
                )
        try:
            if self.num_rows is None:
                yield
            else:
                with self.graphs.swapped_in(worker.target_worker.model_runner):
                    yield
        finally:
            self.cut, self.num_rows, self.verify_len = None, None, self.block
            self.draft_len = self.block
            if self.attention is not None:
                self.attention.blocks, self.attention.ragged = None, False

    def _stays_whole(self, batch: ScheduleBatchLike) -> bool:
        """Whether SGLang reads the output of a batch's pass by the layout of whole blocks."""
        info, captured = batch.sampling_info, self.graphs.runner
        return (
            not self.predicts(len(batch.reqs))
            or (captured is not None and len(batch.reqs) > captured.max_bs)
            or batch.return_logprob
            or batch.has_grammar
            or (info is not None and info.has_custom_logit_processor)
            or (info is not None and current().returns_sampling_masks(info))
        )

    def compact(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> CutBlocks:
        """Select the rows of the pass that runs.

        Args:
            tokens: int64 [B * block], anchors and drafts.
            positions: [B * block].
            slots: [B * block], where keys and values are written.
        """
        assert self.num_rows is not None
        batch, starts = len(tokens) // self.block, self.graphs.starts
        if self.by_request:
            self.selection.admit(
                self.predictor.predictions,
                self._slots[:batch],
                self._drafts[:batch],
                self._others[:batch],
                self.num_rows - batch,
                self._admitted[:batch],
                self._logit_starts,
                starts,
            )
        else:
            even = torch.arange(batch + 1, dtype=torch.int32, device=self.device)
            starts[: batch + 1] = even * self.verify_len
        if self.attention is not None and self.graphs.runner is None:
            self.attention.blocks, self.attention.ragged = self.graphs.blocks, self.by_request
        cut = cut_blocks(
            tokens.view(batch, self.block),
            positions.contiguous(),
            slots.contiguous(),
            self.num_rows,
            starts,
            self.graphs.requests,
        )
        self.cut = CutPass(cut)
        return cut

    def layout(self) -> Any:
        """SGLang's layout of the cut pass that runs."""
        assert self.cut is not None
        assert self.num_rows is not None
        return self.graphs.layout(len(self.cut.rows.kept), self.num_rows)

    def row_counts(self) -> list[int]:
        """Rows of each request in the pass that runs; waits for the device."""
        assert self.cut is not None
        batch = len(self.cut.rows.kept)
        counts: list[int] = self.graphs.starts[: batch + 1].diff().tolist()
        return counts

    def learn(self, committed: Tensor) -> None:
        """Learn from the number of tokens that each request committed in a pass, int [B]."""
        batch = len(committed)
        if self.skips_draft or not self.by_request or not self.predicts(batch):
            return
        starts = None if self.cut is None else self.graphs.starts[: batch + 1]
        self.predictor.learn(committed, starts)
        drafts = self.draft_len - 1
        self.selection.observe(lambda: self.predictor.predictions[:batch, :drafts])


def build_verifier(
    info: DrafterSpec,
    runner: ModelRunnerLike,
    block: int,
    device: torch.device,
    attention: block_attention.BlockAttention | None,
    *,
    agree: Callable[[int], int] | None = None,
    on_any_rank: Callable[[bool], bool] = bool,
    recurrent: str | None = None,
) -> AdaptiveVerifier | None:
    """The verifier that the options ask for, or None where every pass verifies whole blocks.

    Where the options leave it open, verification adapts if the server's settings allow it and it
    was measured to be faster.

    Args:
        info: the drafter, with its options.
        runner: the target's, with its request pool.
        block: rows of a whole block.
        device: of the target.
        attention: which attention the target's passes use, None where that is its back end's own.
        agree: ``agree_across_ranks`` of the ranks.
        on_any_rank: ``any_across_ranks`` of the ranks.
        recurrent: what keeps passes over the target's recurrent layers from being cut, if anything.

    Raises:
        DFlashError: the options ask for it, and the server's settings or the limits do not allow
            it.
    """
    options, server_args = info.options, runner.server_args
    if options.adaptive_verification is False:
        return None
    # It lays out its own inputs for requests with the same number of rows.
    same_rows = argument(server_args, "enable_lora")
    size = int(runner.req_to_token_pool.size)
    obstacle = _obstacle(server_args, recurrent)
    is_optional = options.adaptive_verification is None
    if device.type == "cuda" and same_rows:
        obstacle = obstacle or "a target with LoRA takes whole blocks only: serve it without"
    if is_optional:
        if device.type != "cuda" and attention is None:
            obstacle = obstacle or "it was not measured on this device"
        if device.type == "cuda" and runner.model_config.model_is_mrope:
            obstacle = obstacle or (
                "with several position axes it was not run on a GPU yet; "
                "DFLASH_PLUGIN_ADAPTIVE_VERIFICATION=1 turns it on"
            )
        if obstacle is not None:
            logger.info("adaptive verification is off: %s", obstacle)
            return None
    elif obstacle is not None:
        raise DFlashError(
            f"adaptive_verification is on, but {obstacle}, or turn adaptive_verification off"
        )
    budget = VerifyBudget(options, block - 1, size, device, agree=agree)
    verifier = AdaptiveVerifier(
        budget,
        block,
        size,
        device,
        by_request=not same_rows,
        is_optional=is_optional,
        on_any_rank=on_any_rank,
    )
    verifier.attention = attention
    return verifier


def _obstacle(server_args: Any, recurrent: str | None) -> str | None:
    """What keeps passes from being cut, and what to do about it."""
    if argument(server_args, "disable_cuda_graph_padding"):
        return "disable_cuda_graph_padding is on: leave it out"
    return recurrent
