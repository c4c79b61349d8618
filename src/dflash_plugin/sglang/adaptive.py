"""Adaptive verification: how many rows of each block the target verifies.

SGLang's worker drafts and commits whole blocks. The policy chooses one number for a step, the
average rows of a request, for which there are attention metadata and CUDA graphs
(``verify_graphs``). Which rows they are is decided on the device, by the probability that each
draft is accepted. ``verify_input`` compacts the pass's input to these rows and scatters its output
back to whole-block layout.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from dflash_plugin.sglang.protocols import ModelRunnerLike, ScheduleBatchLike
from dflash_plugin.sglang.verify_graphs import VerifyGraphs, graph_seconds

# Other values run parts of a batch in other processes than its rest, or add rows to it.
REQUIRED_ARGUMENTS = (
    ("pp_size", 1),
    ("dp_size", 1),
    ("attn_cp_size", 1),
    ("dcp_size", 1),
    ("enable_two_batch_overlap", False),
)
# With no more requests than these there is little to save.
FEW_REQUESTS = 8

logger = logging.getLogger(__name__)


class AdaptiveVerifier:
    """Chooses which rows of a batch's blocks a verify pass runs.

    Args:
        policy: chooses the verify length of each step.
        block: rows of a whole block.
        size: largest number of requests in a batch.
        device: of the target.
        options: limits of the number of drafts.
        by_request: requests may have different numbers of rows, where the target's attention is
            this project's.

    Attributes:
        verify_len: rows of a request, on average, in the pass that runs.
        whole_blocks: verify whole blocks, whatever the policy says.
        is_optional: the options leave it open whether passes are cut, so that without graphs they
            are not.
        by_request: requests have different numbers of rows.
        graphs: the passes of fewer rows than a block.
        attention: which attention the target's other passes use, None where that is its back end's
            own.
        cut: the rows that the pass verifies, once it has drafted; None for whole blocks.
        predictor: how probably each draft is accepted.
        selection: selects the drafts that a pass verifies.
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
        self.verify_len, self.whole_blocks = block, False
        self.graphs = VerifyGraphs(block, size, device, ragged=by_request)
        self.attention: triton_attention.VerifyAttention | None = None
        self.cut: CutBlocks | None = None
        self.predictor = AcceptancePredictor(block - 1, size, device)
        self.selection = DraftSelection(options, block - 1, size, device)
        self.by_request = False
        self.is_optional = options.adaptive_verification is None
        self._starts: Tensor | None = None
        counts = torch.ones(3, size, dtype=torch.int32, device=device)
        self._drafts, self._others, self._admitted = counts.unbind()
        self._drafts.fill_(block - 1)
        self._slots = torch.arange(size, device=device)
        self._logit_starts = torch.zeros(size + 1, dtype=torch.int32, device=device)
        if device.type == "cpu":  # Its attention takes blocks of any length.
            self._set_by_request(by_request)

    @property
    def skips_draft(self) -> bool:
        """Whether the pass that runs verifies no draft, so that it needs none."""
        return self.verify_len == 1

    def capture(self, runner: ModelRunnerLike, draft_runner: ModelRunnerLike) -> None:
        """Capture the target's verify passes of every verify length, and time each.

        Args:
            runner: the target's, whose passes of whole blocks are captured already.
            draft_runner: the drafter's, whose passes are captured already.
        """
        whole, passes = runner.decode_cuda_graph_runner, self.graphs.passes
        if whole is None:
            self.whole_blocks = self.is_optional
            return
        policy = self.policy
        policy.sizes = tuple(sorted(whole.capture_bs))
        policy.verify_lens = self.graphs.capture(runner, policy.verify_lens, policy.agree)
        self._set_by_request(self.graphs.can_be_ragged())
        if self.by_request:
            self.selection.compile_ahead(self.predictor.predictions)
        draft = graph_seconds(draft_runner.decode_cuda_graph_runner, self.device)
        for verify_len in policy.verify_lens:
            graphs = passes[verify_len].graphs if verify_len in passes else whole
            for size, seconds in graph_seconds(graphs, self.device).items():
                if verify_len == 1 or size in draft:
                    drafts = draft[size] if verify_len > 1 else 0.0
                    policy.prior[size, verify_len] = seconds + drafts

    def _set_by_request(self, by_request: bool) -> None:
        self.by_request = by_request
        self.policy.expected = self._expected if by_request else self.policy.acceptance.expected

    def _expected(self) -> list[float]:
        return self.selection.expected(lambda verify_len: verify_len - 1)

    @contextmanager
    def verifying(self, worker: Any, batch: ScheduleBatchLike) -> Iterator[None]:
        """Choose the verify length of a decode pass, and run the pass with it.

        Args:
            worker: SGLang's.
            batch: of the pass; one that wants log-probabilities gets whole blocks, since SGLang
                finds these by the layout of whole blocks.
        """
        self.verify_len = self.block
        # A grammar reads the drafts in place; on a GPU SGLang has copied them by then.
        grammar_reads_drafts = self.device.type == "cpu" and batch.has_grammar
        if self.whole_blocks or batch.return_logprob or grammar_reads_drafts:
            self.policy.interrupt()
        else:
            self.verify_len = self.policy.choose(len(batch.reqs), time.monotonic())
        own = self.graphs.passes.get(self.verify_len)
        try:
            with self.graphs.swapped_in(worker.target_worker.model_runner, self.verify_len):
                yield
        finally:
            self.cut, self._starts = None, None
            self.verify_len = self.block
            if own is not None:
                if own.attention is not None:
                    own.attention.ragged = False
            elif self.attention is not None:
                self.attention.blocks, self.attention.ragged = None, False

    def compact(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> CutBlocks:
        """Select the rows of the pass that runs.

        Args:
            tokens: int64 [B * block], anchors and drafts.
            positions: [B * block].
            slots: [B * block], where keys and values are written.
        """
        batch = len(tokens) // self.block
        own = self.graphs.passes.get(self.verify_len)
        if own is None:
            starts, requests = self.graphs.even_rows(self.verify_len)
        else:
            starts, requests = own.starts, own.requests
        even = not self.by_request or self.verify_len == 1
        self._starts = starts[: batch + 1]
        if not even:
            self.selection.admit(
                self.predictor.predictions,
                self._slots[:batch],
                self._drafts[:batch],
                self._others[:batch],
                batch * (self.verify_len - 1),
                self._admitted[:batch],
                self._logit_starts,
                self._starts,
            )
            attention = self.attention if own is None else own.attention
            if attention is not None:
                attention.blocks = Blocks(starts, requests, self.block)
                attention.ragged = True
        self.cut = cut_blocks(
            tokens.view(batch, self.block),
            positions.contiguous(),
            slots.contiguous(),
            self.verify_len,
            starts,
            requests,
            even=even,
        )
        return self.cut

    def row_counts(self) -> list[int]:
        """Rows of each request in the pass that runs; waits for the device."""
        assert self._starts is not None
        counts: list[int] = self._starts.diff().tolist()
        return counts

    def learn(self, committed: Tensor) -> None:
        """Learn from the number of tokens that each request committed in a pass, int [B]."""
        if self.skips_draft or not self.by_request:
            return
        self.predictor.learn(committed, self._starts)
        self.selection.observe(lambda: self.predictor.predictions[: len(committed)])


def agree_across_ranks(group: Any) -> Callable[[int], int] | None:
    """``VerifyLenPolicy``'s ``agree`` for tensor-parallel ranks: the first rank's choice counts.

    Args:
        group: SGLang's ``GroupCoordinator`` of the ranks.
    """
    if group.world_size == 1:
        return None

    def agree(choice: int) -> int:
        chosen = torch.tensor([choice], device="cpu")
        # Between the hosts, so that nothing waits for a device.
        dist.broadcast(chosen, group.ranks[0], group.cpu_group)
        return int(chosen)

    return agree


def build_verifier(
    info: DrafterSpec,
    runner: ModelRunnerLike,
    block: int,
    device: torch.device,
    attention: triton_attention.VerifyAttention | None,
    *,
    agree: Callable[[int], int] | None = None,
    keeps_state: bool = False,
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
        keeps_state: the target keeps state that a shorter pass would leave behind.

    Raises:
        DFlashError: the options ask for it, and the server's settings or the limits do not allow
            it.
    """
    options, server_args = info.options, runner.server_args
    if options.adaptive_verification is False:
        return None
    # Both lay out their own inputs for requests with the same number of rows.
    same_rows = argument(server_args, "enable_lora") or runner.model_config.model_is_mrope
    size = int(runner.req_to_token_pool.size)
    obstacle = _obstacle(server_args, keeps_state)
    if options.adaptive_verification is None:
        if attention is None or same_rows:
            obstacle = obstacle or "requests cannot differ in how many drafts are verified"
        if agree is not None:
            obstacle = obstacle or "it was not measured on several ranks"
        if size <= FEW_REQUESTS:
            obstacle = obstacle or f"no more than {size} requests run at once"
        if obstacle is not None:
            logger.info("adaptive verification is off: %s", obstacle)
            return None
    elif obstacle is not None:
        raise DFlashError(
            f"adaptive_verification is on, but {obstacle}, or turn adaptive_verification off"
        )
    policy = make_policy(options, block - 1, agree=agree)
    verifier = AdaptiveVerifier(policy, block, size, device, options, by_request=not same_rows)
    verifier.attention = attention
    return verifier


def _obstacle(server_args: Any, keeps_state: bool) -> str | None:
    """What keeps passes from being cut, and what to do about it."""
    for name, needed in REQUIRED_ARGUMENTS:
        given = argument(server_args, name)
        if given not in (None, needed):
            return f"{name} is {given!r}: set it to {needed!r}"
    if keeps_state:
        return "the target keeps state that a shorter pass would leave behind: use another target"
    return None
