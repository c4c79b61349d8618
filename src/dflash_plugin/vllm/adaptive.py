"""Adaptive verification in vLLM's V2 runner, in the place of vLLM's own choice.

The policy chooses how many drafts a step verifies, from the drafts' acceptance probabilities and
from the time between steps, which includes the host's share. The device then selects the drafts in
one launch. vLLM's estimator gives the acceptance probabilities. A step that verifies all drafts, or
none, runs as vLLM prepares it.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dflash_plugin.adaptive.acceptance_model import LEARNING
from dflash_plugin.adaptive.step_cost import StepCost
from dflash_plugin.serving.adaptive_setup import VerifyBudget, bypass_of, milliseconds
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.serving.ranks import agree_across_ranks
from dflash_plugin.serving.start_times import StartTimes
from dflash_plugin.vllm import adaptive_default, compat
from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import (
    AcceptanceEstimator,
    AdaptiveVerificationManager,
    Counts,
    InputBatch,
    RequestState,
    StepTimingSample,
    VllmConfig,
)
from dflash_plugin.vllm.step_profile import StepProfile

logger = logging.getLogger("vllm.dflash_plugin")

# vLLM's back end of the layers whose state follows a gated delta rule; others' are their own.
GATED_DELTA_RULE = "GDNAttentionBackend"
# Steps between two lines in the log.
REPORT = 20000


class AdaptiveManager:
    """Stands in for vLLM's ``AdaptiveVerificationManager``; the runner calls it in the same way.

    A method that only vLLM's manager has is taken from there.

    Args:
        native: vLLM's manager, which knows what to profile at start and how a batch is laid out.
        options: limits of the number of drafts.
        req_states: the runner's requests.
        query_start_loc: int32 [R + 1], where the tokens of each request begin in the batch.
        max_logits: logits rows of a step, at most.
        admits_on_host: this vLLM version reads a fourth value from ``reallocate_drafts``.
        agree: ``agree_across_ranks`` of the ranks. All of them prepare the same steps, and find the
            same acceptance probabilities; only their clocks differ.

    Attributes:
        verify_len: rows of a request in the next step, on average; 1 verifies no draft.
        draft_len: rows of the blocks that this step drafts, the anchor included; the next step
            verifies no more of a request.
        acceptance_probs: float32 [R, K], the probability that a draft is accepted if those before
            it are, by request slot; set when the drafter is loaded.
        block, short: rows of a whole block and of a shorter one; 0 where there are only whole ones.
        bypass: batches of no more requests than these verify whole blocks, without a choice.
        prompts_had_slots: when the last step began, every prompt that waited could have run but for
            the tokens of a step and the room in the KV cache.
        steps: steps that did not bypass the choice.
    """

    def __init__(
        self,
        native: AdaptiveVerificationManager,
        options: Options,
        req_states: RequestState,
        query_start_loc: Tensor,
        max_logits: int,
        admits_on_host: bool,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self.native, self.query_start_loc = native, query_start_loc
        self.max_logits, self.admits_on_host = max_logits, admits_on_host
        self.drafts = int(req_states.num_speculative_steps)
        self.device = torch.device(req_states.device)
        size = int(req_states.max_num_reqs)
        self.acceptance_probs = torch.zeros(size, self.drafts, device=self.device)
        self.budget = VerifyBudget(options, self.drafts, size, self.device, agree=agree)
        self.policy, self.selection = self.budget.policy, self.budget.selection
        # With several ranks the policy is not in the process that schedules.
        self.policy.may_wait = agree is None
        self.block, self.short = self.policy.block, 0
        self.verify_len, self.draft_len = self.policy.verify_lens[-1], self.block
        self.bypass, self._bypasses = 0, False
        self.prompts_had_slots = False
        self._profile = StepProfile(self.block, size)
        # The speculator's, once that has this manager.
        self.start_times = StartTimes()
        self._send = _sender(self.device)
        # Requests whose drafts the last step made.
        self._drafted_for: Sequence[str] = ()
        # Tensors that were sent once and are used again.
        self._sent_starts: dict[tuple[int, int], Tensor] = {}
        self._sent_counts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.steps = 0
        # Of the step that is being prepared: drafts to verify, whether these are all that are
        # scheduled, drafts of a request that may be verified, whether each request has a whole
        # block and one other token, scheduled drafts and tokens of each request, and where each
        # request's logits begin.
        self._draft_budget, self._is_whole, self._limit = 0, True, self.drafts
        self._is_decoding = False
        self._drafts, self._starts = np.zeros(0, np.int32), np.zeros(1, np.int32)
        self._tokens = self._drafts

    def __getattr__(self, name: str) -> Any:
        """What vLLM's manager has and this class lacks."""
        if name == "native":  # Asked for before __init__ has set it.
            raise AttributeError(name)
        return getattr(self.native, name)

    # At start.

    def draft_short_blocks(self) -> bool:
        """Let the policy choose shorter blocks, too, if the options let it verify so few drafts."""
        if self.budget.short is None:
            return False
        self.budget.draft_short_blocks()
        self.short = self.budget.short
        return True

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """The batches that vLLM profiles, with less context, some of them with shorter blocks.

        Args:
            capture_sizes: tokens of the captured passes.
        """
        self.budget.capture_sizes = sorted(capture_sizes)
        batches = self.native.batches_to_profile(capture_sizes)
        most = max(capture_sizes, default=0) if self.short else 0
        # The runner runs a batch before it asks for the next one.
        with self.start_times.part("steps timed"):
            for batch, is_short in self._profile.batches(batches, most):
                self.draft_len = self.short if is_short else self.block
                yield batch
        self.draft_len = self.block

    def set_initial_cost_curves(self, samples: Sequence[StepTimingSample]) -> None:
        """Set the policy's initial step times, and compile the launch.

        Args:
            samples: profiled steps; times in milliseconds.
        """
        verifying, drafting, short = self._profile.seconds(samples)
        if verifying and drafting:
            self.budget.set_costs(tuple(drafting), verifying, drafting, drafting_short=short)
            self._find_bypass(drafting, verifying)
            logger.info(
                "milliseconds of verify passes by tokens: %s; of draft passes by requests: %s",
                milliseconds(verifying), milliseconds(drafting),
            )  # fmt: skip
        both = drafting.keys() & short.keys()
        if both:
            most = max(both)
            logger.info(
                "drafts of %d requests take %.2f ms in blocks of %d rows and %.2f in shorter ones",
                most, 1e3 * drafting[most], self.block, 1e3 * short[most],
            )  # fmt: skip
        with self.start_times.part("selection of drafts compiled"):
            self.selection.compile_ahead(self.acceptance_probs)
        logger.info("%s", self.start_times)

    def _find_bypass(self, requests: Iterable[int], verifying: Mapping[int, float]) -> None:
        """Find the batches that gain nothing from shorter passes, where the options leave whole.

        Args:
            requests: of the batches that are captured.
            verifying: seconds of a verify pass by its tokens.
        """
        block, cost = self.drafts + 1, StepCost.measured(verifying, {})
        if self.policy.verify_lens[-1] == block:
            most = min(max(verifying), self.max_logits)
            captured = [size for size in requests if size * block <= most]
            self.bypass = bypass_of({n: cost.verify_seconds(n * block) for n in captured})
        if self.policy.agree is not None:
            self.bypass = self.policy.agree(self.bypass)
        logger.info("verify passes of more than %d requests may be cut", self.bypass)

    # While serving.

    def add_request(self, req_idx: int) -> None:
        """Leave the time of the step that reads the new request's prompt out of the policy."""
        self.policy.interrupt()

    def get_num_tokens(
        self, num_tokens_per_req: Mapping[str, int], draft_tokens: Mapping[str, Sequence[int]]
    ) -> int:
        """Tokens of the step, after the number of drafts to verify has been chosen.

        Args:
            num_tokens_per_req: scheduled tokens by request, drafts included.
            draft_tokens: the drafts of those requests that have drafts.
        """
        requests = len(num_tokens_per_req)
        drafts = sum(map(len, draft_tokens.values()))
        tokens = sum(num_tokens_per_req.values())
        if self._bypasses and requests <= self.bypass and self._are_last(draft_tokens):
            # The last step bypassed the choice, too, and drafted whole blocks.
            self._draft_budget, self._is_whole = drafts, True
            return tokens
        others = tokens - drafts
        verify_len, verifying = self.verify_len, len(draft_tokens)
        self._limit = self._most_verified(draft_tokens)
        self._is_decoding = others == requests and drafts == requests * self.drafts
        if not self._is_decoding:
            self.policy.interrupt()
        self._bypasses = requests <= self.bypass
        if self._bypasses:
            self.policy.leave()
            self.verify_len, self.draft_len = self.policy.verify_lens[-1], self.block
            verify_len = self.verify_len if verify_len > 1 else 1
        else:
            # This step drafts for the next one, and skips drafting if that verifies no draft.
            self.verify_len = self.policy.choose(verifying, time.monotonic())
            self.draft_len = self.policy.draft_len
        self.budget.requests = verifying
        available = verifying * self._limit
        if drafts < verifying * self.drafts:
            available = sum(min(len(ids), self._limit) for ids in draft_tokens.values())
        self._draft_budget = min(
            available,
            self.budget.drafts_to_verify(verify_len, others, verifying, self._limit + 1),
            max(0, self.max_logits - requests),
        )
        self._is_whole = self._draft_budget == drafts
        if not self._is_decoding and not self._bypasses:
            # The time until the next step includes this step's prompts.
            rows = verifying + self._draft_budget
            self.policy.read_prompts(requests - verifying, others - verifying, rows)
        return others + self._draft_budget

    def _are_last(self, draft_tokens: Mapping[str, Sequence[int]]) -> bool:
        """Whether the last step made the drafts of all requests, or any step made as many."""
        return not self.short or draft_tokens.keys() <= set(self._drafted_for)

    def _most_verified(self, draft_tokens: Mapping[str, Sequence[int]]) -> int:
        """Drafts of a request that the step may verify: no more than were made.

        A request schedules as many drafts as a whole block has, but behind its drafts of a shorter
        block stand those of an earlier step, of another request or none. Nearly always the last
        step made the drafts of all requests: it is the last one with any (a preempted request
        drafts again behind its prompt, as does every chunk of a prompt), and the host prepares
        steps in the order in which the device runs them. A request that sat out the last step may
        hold drafts of a shorter block; all requests have as many then, for one step.
        """
        drafted = self.draft_len
        if drafted > self.short and not self._are_last(draft_tokens):
            drafted = self.short
        return min(drafted, self.policy.verify_lens[-1]) - 1

    def draft_whole_blocks(self) -> None:
        """Let the step that comes next draft whole blocks, whatever was chosen before."""
        self.verify_len, self.draft_len = self.policy.verify_lens[-1], self.block

    def compact_batch(
        self,
        num_draft_tokens_per_req: Counts,
        num_scheduled_tokens: Counts,
        cu_num_logits_np: Counts,
    ) -> tuple[Counts, Counts]:
        """The host's view of the batch, as vLLM lays it out for this number of drafts.

        It is exact where all drafts are verified, or none. Otherwise the host spreads the drafts
        evenly, and the device decides.

        Args:
            num_draft_tokens_per_req: int32 [B].
            num_scheduled_tokens: int32 [B], drafts included.
            cu_num_logits_np: int32 [B + 1], where each request's logits begin if all drafts are
                verified.

        Returns:
            Tokens of each request, int32 [B], and where its logits begin, int32 [B + 1].
        """
        if self._is_whole:
            self._starts = cu_num_logits_np
            return num_scheduled_tokens, cu_num_logits_np
        self._drafts, self._tokens = num_draft_tokens_per_req, num_scheduled_tokens
        self.native._batch_budget = ({}, {}, self._draft_budget)
        tokens, self._starts = self.native.compact_batch(
            num_draft_tokens_per_req, num_scheduled_tokens, cu_num_logits_np
        )
        return tokens, self._starts

    def reallocate_drafts(self, req_ids: Sequence[str], idx_mapping: Tensor) -> tuple[Any, ...]:
        """The device's view of the batch.

        Args:
            req_ids: requests in the order of the batch.
            idx_mapping: int64 [B], their slots.

        Returns:
            Where each request's logits begin, int32 [B + 1]; where its tokens begin, the runner's
            own tensor; the number of drafts; and None, where this vLLM version reads a fourth
            value.
        """
        batch = len(req_ids)
        if self._is_whole or self._draft_budget == 0:
            # What the runner has sent already is exact.
            logit_starts = self._starts_on_device(batch)
        else:
            drafts, others = self._counts_on_device(batch)
            logit_starts = torch.empty(batch + 1, dtype=torch.int32, device=self.device)
            self.selection.admit(
                self.acceptance_probs,
                idx_mapping,
                drafts,
                others,
                self._draft_budget,
                torch.empty_like(drafts),
                logit_starts,
                self.query_start_loc,
            )
        found = (logit_starts, self.query_start_loc, self._draft_budget)
        return (*found, None) if self.admits_on_host else found

    def record_confidences(self, confidence_probs: Tensor, input_batch: InputBatch) -> None:
        """Count the step, and copy the acceptance probabilities of its drafts when that is due.

        Args:
            confidence_probs: vLLM's copy of the acceptance probabilities, which is not used.
            input_batch: the runner's batch.
        """
        self._drafted_for = input_batch.req_ids
        if self._bypasses:
            return
        self.steps += 1
        if self.steps % REPORT == 0:
            logger.info("adaptive verification after %d steps: %s", self.steps, self.summary())
        if self.verify_len > 1:
            drafts = self.draft_len - 1
            self.selection.observe(
                lambda: self.acceptance_probs[input_batch.idx_mapping][:, :drafts]
            )

    @property
    def learns(self) -> bool:
        """Whether the estimator learns from this step's outcome."""
        return not self._bypasses and self.steps % LEARNING == 0

    def summary(self) -> dict[str, object]:
        """What has been learned and chosen so far: ``VerifyLenPolicy.summary``."""
        return self.policy.summary()

    def _counts_on_device(self, batch: int) -> tuple[Tensor, Tensor]:
        """Drafts that may be verified and other tokens of each request.

        They are sent once where all requests have the same.
        """
        key = batch, self._limit
        if self._is_decoding and key in self._sent_counts:
            return self._sent_counts[key]
        may_be_verified = np.minimum(self._drafts, self._limit)
        counts = np.stack([may_be_verified, self._tokens - self._drafts])
        drafts, others = self._send(counts.astype(np.int32, copy=False))
        if self._is_decoding:
            self._sent_counts[key] = drafts, others
        return drafts, others

    def _starts_on_device(self, batch: int) -> Tensor:
        """Where each request's logits begin; sent once where all requests have the same number."""
        if self._draft_budget not in (0, batch * self.drafts):
            return self._send(self._starts)
        key = batch, self._draft_budget
        if key not in self._sent_starts:
            self._sent_starts[key] = self._send(self._starts)
        return self._sent_starts[key]


def _sender(device: torch.device) -> Callable[[Counts], Tensor]:
    """vLLM's copy from the host to ``device``, which nobody waits for."""
    from vllm.utils.torch_utils import async_tensor_h2d

    def send(counts: Counts) -> Tensor:
        sent: Tensor = async_tensor_h2d(counts, device=device)
        return sent

    return send


# A runner keeps its manager alive, not this.
_latest: weakref.ref[AdaptiveManager] | None = None


def latest() -> AdaptiveManager | None:
    """The manager of the runner that was set up last in this process, if it has one.

    For that runner's speculator. Others ask ``of_runner``: a process can have several runners.
    """
    return None if _latest is None else _latest()


def of_runner(runner: Any) -> AdaptiveManager | None:
    """The manager of a model runner, or None where vLLM's own or none decides."""
    manager = vars(runner).get("adaptive_verification")
    return manager if isinstance(manager, AdaptiveManager) else None


def of_worker(worker: Any) -> dict[str, object] | None:
    """``AdaptiveManager.summary``, for ``collective_rpc("dflash_adaptive")``.

    Args:
        worker: vLLM's.

    Returns:
        None where vLLM's own manager decides.
    """
    manager = of_runner(worker.model_runner)
    return None if manager is None else manager.summary()


def compile_estimator(estimator: AcceptanceEstimator, device: torch.device) -> None:
    """Compile the estimator's launches before requests wait for them; it learns nothing from this.

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


def without_delta_rules(groups: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The groups of layers of which vLLM asks whether passes over them can be cut.

    vLLM says no of every back end of gated delta rules. But of a cut pass their metadata take from
    the host what holds there too: the number of tokens, and which requests verify. The rows of each
    request are read on the device.

    Args:
        groups: vLLM's ``AttentionGroup`` of each KV cache group.
    """
    return [
        [group for group in part if group.backend.__name__ != GATED_DELTA_RULE] for part in groups
    ]


def _across_ranks() -> Callable[[int], int] | None:
    from vllm.distributed.parallel_state import get_tp_group

    return agree_across_ranks(get_tp_group())


def create_manager(native: Callable[..., Any]) -> Callable[..., Any]:
    """``maybe_create_adaptive_verification_manager`` that wraps what vLLM makes.

    vLLM's own manager decides where the drafter is not the plugin's, and with data parallelism.
    """

    @wraps(native)
    def create(
        *,
        vllm_config: VllmConfig,
        attn_groups: Sequence[Sequence[Any]],
        req_states: RequestState,
        query_start_loc: Tensor,
        num_bonus_tokens: int,
        max_total_logits: int,
        **others: Any,
    ) -> Any:
        global _latest
        _latest = None
        spec = drafter_spec(vllm_config.speculative_config)
        if spec is not None and compat.current().keeps_verifying:
            attn_groups = without_delta_rules(attn_groups)
        try:
            made = native(
                vllm_config=vllm_config,
                attn_groups=attn_groups,
                req_states=req_states,
                query_start_loc=query_start_loc,
                num_bonus_tokens=num_bonus_tokens,
                max_total_logits=max_total_logits,
                **others,
            )
        except ValueError as error:
            if adaptive_default.turn_off(error):
                return None
            raise
        parallel = vllm_config.parallel_config
        copies = parallel.data_parallel_size
        if made is None or spec is None or copies > 1 or num_bonus_tokens != 1:
            return made
        manager = AdaptiveManager(
            made,
            spec.options,
            req_states,
            query_start_loc,
            max_total_logits,
            compat.current().admits_on_host,
            _across_ranks() if parallel.tensor_parallel_size > 1 else None,
        )
        _latest = weakref.ref(manager)
        return manager

    return create
