"""Adaptive verification in vLLM's V2 runner, in the place of vLLM's own.

How many drafts a step verifies is this project's choice (``budget.width``): by the drafts' chances
and by the time between steps, so that what the host takes counts too. Which drafts they are, the
device decides in one launch; vLLM's estimator gives the chances. A step that verifies all drafts,
or none, is not touched.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from itertools import product
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_plugin.adaptive.acceptance_model import LEARNING
from dflash_plugin.adaptive.expected_tokens import ExpectedTokens
from dflash_plugin.adaptive.policy import VerifyLenPolicy, choose_widths
from dflash_plugin.adaptive.step_cost import StepCost
from dflash_plugin.kernels.admit_drafts import admit_drafts, compile_ahead
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.vllm import compat
from dflash_plugin.vllm.options import drafter_spec

logger = logging.getLogger("vllm.dflash_plugin")

Counts = NDArray[np.int32]
# Steps between two lines in the log.
REPORT = 20000


class Budget:
    """What vLLM's runner asks, as it asks its own ``AdaptiveVerificationManager``.

    Args:
        native: that one, which knows what to profile at start.
        options: limits of the number of drafts.
        req_states: the runner's requests.
        query_start_loc: int32 [R + 1], where the tokens of each request begin in the batch.
        most_logits: of a step, at most.
        admits_on_host: the version asks for a fourth part of ``reallocate_drafts``.

    Attributes:
        width: rows of a request in the step that comes, on average; 1 verifies no draft.
        chances: float32 [R, K], that a draft stands if those before it do, by request's slot; set
            when the drafter is there.
    """

    def __init__(
        self,
        native: Any,
        options: Options,
        req_states: Any,
        query_start_loc: Tensor,
        most_logits: int,
        admits_on_host: bool,
    ) -> None:
        self.native, self.query_start_loc = native, query_start_loc
        self.most_logits, self.admits_on_host = most_logits, admits_on_host
        self.drafts = int(req_states.num_speculative_steps)
        self.device = torch.device(req_states.device)
        size = int(req_states.max_num_reqs)
        self.chances = torch.zeros(size, self.drafts, device=self.device)
        self.promise = ExpectedTokens(self.drafts, size, self.device)
        widths = choose_widths(self.drafts + 1, options.min_draft_tokens, options.max_draft_tokens)
        self.policy = VerifyLenPolicy(
            widths, (), options.latency_vs_throughput, expected=self._expected
        )
        self.width = widths[-1]
        self._admit = partial(
            admit_drafts,
            min_drafts=options.min_draft_tokens,
            max_drafts=options.max_draft_tokens,
        )
        self._sizes: list[int] = []
        self._even: dict[tuple[int, int], Tensor] = {}
        self._alike: dict[int, tuple[Tensor, Tensor]] = {}
        self._steps = 0
        # Of the step that is being prepared.
        self._budget, self._requests = 0, 0
        self._drafts, self._starts = np.zeros(0, np.int32), np.zeros(1, np.int32)
        self._others = self._drafts

    # At start.

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """What vLLM would profile.

        Args:
            capture_sizes: tokens of the captured passes.
        """
        self._sizes = sorted(capture_sizes)
        batches: Iterator[dict[str, int]] = self.native.batches_to_profile(capture_sizes)
        return batches

    def set_initial_cost_curves(self, samples: Sequence[Any]) -> None:
        """Take what passes took, and compile the launch.

        Args:
            samples: vLLM's ``StepTimingSample``.
        """
        verify, draft = defaultdict(list), defaultdict(list)
        for sample in samples:
            verify[sample.num_target_tokens].append(sample.forward_ms)
            if sample.full_cudagraph:  # Others draft eagerly.
                draft[sample.num_reqs].append(sample.drafter_ms)
        if verify and draft:
            verifying, drafting = (
                {size: median(times) / 1e3 for size, times in table.items()}
                for table in (verify, draft)
            )
            self.policy.sizes = tuple(sorted(drafting))
            cost = StepCost.measured(verifying, drafting)
            for size, width in product(self.policy.sizes, self.policy.widths):
                tokens = size + self._budget_of(width, size, size)
                drafts = size if width > 1 else 0
                self.policy.prior[size, width] = cost.step_seconds(tokens, drafts)
        compile_ahead(self._admit, self.chances)

    # While serving.

    def add_request(self, req_idx: int) -> None:
        """A new request: the step that reads its prompt is not one to be timed."""
        self.policy.interrupt()

    def get_num_tokens(
        self, num_tokens_per_req: Mapping[str, int], draft_tokens: Mapping[str, Sequence[int]]
    ) -> int:
        """Tokens of the step, with as many drafts as it shall verify.

        Args:
            num_tokens_per_req: scheduled, drafts among them.
            draft_tokens: the drafts of those that have some.
        """
        requests = len(num_tokens_per_req)
        drafts = sum(map(len, draft_tokens.values()))
        others = sum(num_tokens_per_req.values()) - drafts
        width, verifying = self.width, len(draft_tokens)
        decoding = others == requests and drafts == requests * self.drafts
        if not decoding:
            self.policy.interrupt()
        # A step drafts for the next one, and so has to know whether that verifies any.
        self.width = self.policy.choose(verifying, time.monotonic())
        if not decoding:  # Nor does this step's time tell of steps without prompts.
            self.policy.interrupt()
        self._report()
        self._requests = verifying
        self._budget = min(
            drafts,
            self._budget_of(width, others, verifying),
            max(0, self.most_logits - requests),
        )
        return others + self._budget

    def compact_batch(
        self, num_draft_tokens_per_req: Counts, num_scheduled_tokens: Counts, starts: Counts
    ) -> tuple[Counts, Counts]:
        """The host's view of the batch: its tokens by request, and where their logits begin.

        Exact where all drafts are verified or none; otherwise the device decides, and the drafts
        are spread evenly here.

        Args:
            num_draft_tokens_per_req: int32 [B].
            num_scheduled_tokens: int32 [B], drafts among them.
            starts: int32 [B + 1], where each request's logits begin if all drafts are verified.
        """
        self._drafts = num_draft_tokens_per_req
        self._others = num_scheduled_tokens - num_draft_tokens_per_req
        self._starts = starts
        if self._is_whole:
            return num_scheduled_tokens, starts
        if self._budget == 0:
            self._starts = np.arange(len(starts), dtype=starts.dtype)
            return self._others, self._starts
        # Requests that verify stand in front.
        verifying = int((num_draft_tokens_per_req > 0).sum())
        spread = np.zeros_like(self._others)
        spread[:verifying] = self._budget // verifying
        spread[: self._budget % verifying] += 1
        return self._others + spread, starts

    def reallocate_drafts(self, req_ids: Sequence[str], idx_mapping: Tensor) -> tuple[Any, ...]:
        """The device's view of the batch.

        Args:
            req_ids: of the batch, in its order.
            idx_mapping: int64 [B], their slots.

        Returns:
            Where each request's logits begin, int32 [B + 1]; where its tokens begin, the runner's
            own tensor; the number of drafts; and, where the version asks for it, None.
        """
        from vllm.utils.torch_utils import async_tensor_h2d

        if self._is_whole or self._budget == 0:
            # What the runner has sent already is exact.
            logit_starts = self._starts_on_device(len(req_ids), async_tensor_h2d)
        else:
            batch = len(req_ids)
            drafts, others = self._counts_on_device(async_tensor_h2d)
            logit_starts = torch.empty(batch + 1, dtype=torch.int32, device=self.device)
            self._admit(
                self.chances,
                idx_mapping,
                drafts,
                others,
                self._budget,
                torch.empty_like(drafts),
                logit_starts,
                self.query_start_loc,
            )
        found = (logit_starts, self.query_start_loc, self._budget)
        return (*found, None) if self.admits_on_host else found

    def record_confidences(self, confidence_probs: Tensor, input_batch: Any) -> None:
        """The step has drafted: see now and then what its drafts promise.

        Args:
            confidence_probs: vLLM's copy of the chances, which is not used.
            input_batch: the runner's.
        """
        self._steps += 1
        if self.width > 1 and self.promise.is_due():
            self.promise.ask(self.chances[input_batch.idx_mapping])

    @property
    def learns(self) -> bool:
        """Whether the outcome of this step's drafts is looked at."""
        return self._steps % LEARNING == 0

    def summary(self) -> dict[str, object]:
        """What has been learnt and chosen so far, as ``VerifyLenPolicy.summary`` has it."""
        return self.policy.summary()

    def _counts_on_device(self, send: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Drafts and other tokens of each request; sent once where all have as many."""
        counts = np.stack([self._drafts, self._others]).astype(np.int32, copy=False)
        if (counts != [[self.drafts], [1]]).any():
            drafts, others = send(counts, device=self.device)
            return drafts, others
        batch = counts.shape[1]
        if batch not in self._alike:
            drafts, others = send(counts, device=self.device)
            self._alike[batch] = drafts, others
        return self._alike[batch]

    def _starts_on_device(self, batch: int, send: Callable[..., Tensor]) -> Tensor:
        """Where each request's logits begin; sent once where all have as many."""
        if self._budget not in (0, batch * self.drafts):
            return send(self._starts, device=self.device)
        kind = batch, self._budget
        if kind not in self._even:
            self._even[kind] = send(self._starts, device=self.device)
        return self._even[kind]

    @property
    def _is_whole(self) -> bool:
        return self._budget == int(self._drafts.sum())

    def _budget_of(self, width: int, others: int, verifying: int) -> int:
        """Drafts of a step in which requests have so many rows on average.

        What a captured pass holds beyond that is used too.

        Args:
            width: rows.
            others: tokens of the step beside drafts.
            verifying: requests that have drafts.
        """
        most = verifying * (self.policy.widths[-1] - 1)
        wanted = verifying * (width - 1)
        if not 0 < wanted < most:
            return wanted
        index = bisect_left(self._sizes, others + wanted)
        if index < len(self._sizes):
            wanted = self._sizes[index] - others
        return min(wanted, most)

    def _expected(self) -> list[float]:
        """Tokens that a request commits in a step of 1, 2, … rows."""
        requests = max(1, self._requests)
        return [
            self.promise.tokens(self._budget_of(rows, requests, requests) / requests)
            for rows in range(1, self.drafts + 2)
        ]

    def _report(self) -> None:
        steps = sum(self.policy.steps.values())
        if steps % REPORT == 0:
            logger.info("adaptive verification after %d steps: %s", steps, self.summary())


_latest: Budget | None = None


def latest() -> Budget | None:
    """That of the runner that is being set up in this process."""
    return _latest


def of_worker(worker: Any) -> dict[str, object] | None:
    """``Budget.summary``, by ``collective_rpc("dflash_adaptive")``; None where vLLM's own decides.

    Args:
        worker: vLLM's, of this process.
    """
    return None if _latest is None else _latest.summary()


def compile_estimator(estimator: Any, device: torch.device) -> None:
    """Have vLLM's estimator learn nothing, once: its launches are compiled before requests wait.

    Args:
        estimator: vLLM's.
        device: of its state.
    """
    if device.type != "cuda":
        return
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    rejected = torch.zeros(1, dtype=torch.int32, device=device)
    for _ in range(estimator.REFIT_INTERVAL):
        estimator.step(slots, torch.ones_like(rejected), rejected)


def patch(module: ModuleType) -> None:
    """Give vLLM's runner ours, where the drafter is and nothing but this process decides.

    Args:
        module: vLLM's V2 runner.
    """
    runner: Any = module
    native: Callable[..., Any] = runner.maybe_create_adaptive_verification_manager

    @wraps(native)
    def create(*, vllm_config: Any, **given: Any) -> Any:
        global _latest
        _latest = None
        made = native(vllm_config=vllm_config, **given)
        info = drafter_spec(vllm_config.speculative_config)
        parallel = vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
        if made is None or info is None or ranks > 1 or given["num_bonus_tokens"] != 1:
            return made
        _latest = Budget(
            made,
            info.options,
            given["req_states"],
            given["query_start_loc"],
            given["max_total_logits"],
            compat.current().admits_on_host,
        )
        return _latest

    runner.maybe_create_adaptive_verification_manager = create
