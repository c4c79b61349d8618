"""The DFLASH worker: SGLang's own, around this project's drafter.

Scheduling, block preparation, verify passes, CUDA graphs and publishing are inherited. What is
replaced: the drafter, injection, drafting from the head, acceptance of requests that sample,
penalties, how many rows of a block are verified, and the attention of blocks where the back end is
Triton's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.speculative import dflash_worker_v2
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.decoding.sampling import SamplingTensors
from dflash_plugin.kernels.accept import Sampled, accept
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream
from dflash_plugin.serving.draft_tokens import Candidates, noise, select_drafts, selector_noise
from dflash_plugin.sglang import metrics, penalties, sampling, triton_attention
from dflash_plugin.sglang.adaptive import (
    AdaptiveVerifier,
    agreement,
    route_inputs,
    skipping,
    widths_of,
)
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.model import EngineDrafter
from dflash_plugin.sglang.options import draft_model_path, required_spec

if TYPE_CHECKING:
    from dflash_plugin.drafter.selector import Proposal
    from dflash_plugin.kernels.select_path import Path

# No batch that is captured is larger, unless the server runs more requests.
MAX_CAPTURED = 1024


@dataclass
class Step:
    """One decode pass of a batch.

    Attributes:
        batch: SGLang's ``ScheduleBatch``.
        anchors: int64 [B], positions of the anchors.
        params: how its requests sample, or None where all are greedy.
        draft_probs: float32 [B, K, V] that the drafts were drawn from, or None for chosen drafts.
        penalties: of its requests, or None where they have none.
    """

    batch: Any
    anchors: Tensor
    params: SamplingTensors | None = None
    draft_probs: Tensor | None = None
    penalties: penalties.Penalties | None = None


class Drafting(NamedTuple):
    """What a draft pass gives to choose or draw drafts by.

    Attributes:
        hidden: [B * K, hidden], the rows that draft.
        anchors: int64 [B], the blocks' anchors.
        candidates: the rows' likeliest tokens; None where the drafter has no selector.
    """

    hidden: Tensor
    anchors: Tensor
    candidates: Candidates | None

    def of_first(self, batch: int, drafts: int) -> Drafting:
        """Those of the first requests of a padded batch, with so many drafts each."""
        rows, found = batch * drafts, self.candidates
        if found is not None:
            found = found.first(rows)
        return Drafting(self.hidden[:rows], self.anchors[:batch], found)


class DraftGraphHead:
    """Greedy drafts, made at the end of the captured draft pass.

    Args:
        worker: whose model's head it runs.
        max_batch: largest captured batch.
    """

    def __init__(self, worker: Worker, max_batch: int) -> None:
        self.worker = worker
        rows = max_batch * worker.num_drafts
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=worker.device)
        self.captured: dict[int, Drafting] = {}

    def __call__(self, hidden: Tensor, input_ids: Tensor) -> None:
        """Capture the head over block rows [B * block, hidden] of tokens [B * block]."""
        rows = self.worker.drafting_rows(hidden)
        anchors = input_ids[: len(hidden)].view(-1, int(self.worker.block_size))[:, 0]
        drafting = self.worker.drafting(rows, anchors)
        self.captured[len(anchors)] = drafting
        self.tokens[: rows.shape[0]].copy_(self.worker.choose_drafts(drafting))

    @property
    def out(self) -> Tensor:
        """Drafts of the pass that was replayed, int64 [at least B * K]."""
        step = self.worker.step
        if step is None or not self.worker.draws_drafts(step) or self.worker.skips_draft:
            return self.tokens
        size = len(step.batch.reqs)
        captured = min(batch for batch in self.captured if batch >= size)
        drafting = self.captured[captured].of_first(size, self.worker.num_drafts)
        return self.worker.draw_drafts(drafting, step)


class Worker(DFlashWorkerV2):
    """Drives the hosted drafter; takes whatever constructor arguments its version passes."""

    widths: AdaptiveVerifier | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step: Step | None = None
        server_args = kwargs.get("server_args", args[0] if args else None)
        self.info = required_spec(draft_model_path(server_args))
        if argument(server_args, "device") == "cpu":
            from dflash_plugin.sglang.cpu.setup import install

            install()
        super().__init__(*args, **kwargs)
        self.draft_model: EngineDrafter
        self.draft_model.bind(self.target_worker.model_runner.model)
        self.draft_model.set_block_size(self.block_size)
        self.noise = sampling.Noise(
            int(argument(server_args, "random_seed") or 0), torch.device(self.device)
        )
        self.vocab_size = int(self.target_worker.model_runner.model_config.vocab_size)
        self.graph_injects, self.in_graph = False, False
        _note_graphs(self)
        _seed_first_tokens(self.target_worker.model_runner, self.noise)
        _route(dflash_worker_v2)

    @property
    def num_drafts(self) -> int:
        """Drafts of a block, the anchor not counted, whether they are verified or not."""
        return int(self.block_size) - 1

    @property
    def skips_draft(self) -> bool:
        """Whether the pass that runs verifies no draft."""
        return self.widths is not None and self.widths.skips_draft

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """One pass over a batch: a prefill, or draft, verify and inject."""
        decodes = not (batch.forward_mode.is_extend() or batch.is_extend_in_batch)
        if self.widths is not None and (not decodes or batch.forward_mode.is_idle()):
            self.widths.policy.interrupt()
        if not decodes:
            return self._prefill(batch, *args, **kwargs)
        if batch.forward_mode.is_idle() or batch.spec_info is None:
            return super().forward_batch_generation(batch, *args, **kwargs)
        self.step = self._begin(batch)
        verifying: Any = nullcontext()
        if self.widths is not None:
            verifying = self.widths.verifying(self, batch)
        with _routing_to(self), verifying:
            try:
                result = super().forward_batch_generation(batch, *args, **kwargs)
                if self.widths is not None:
                    setattr(result, metrics.ROWS, self.widths.chosen)
            finally:
                step, self.step = self.step, None
        if step is not None and step.penalties is not None:
            tokens = result.next_token_ids.view(len(batch.reqs), -1)
            penalties.count(step.penalties, tokens, result.accept_lens.long())
        return result

    def _prefill(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        info = batch.sampling_info
        if info is None or batch.forward_mode.is_idle():
            return super().forward_batch_generation(batch, *args, **kwargs)
        device = torch.device(self.device)
        if not info.is_all_greedy:
            setattr(info, sampling.SEEDS, sampling.given_seeds(batch.reqs, device))
        if not penalties.are_asked_for(info):
            return super().forward_batch_generation(batch, *args, **kwargs)
        # Those that decode in a mixed batch have begun; the host may not know all they wrote.
        decoding = {id(request) for request in batch.decoding_reqs or ()}
        new = [request for request in batch.reqs if id(request) not in decoding]
        penalties.begin(new, self.vocab_size, device)
        written = penalties.to_device([len(request.output_ids) for request in batch.reqs], device)
        gathered = penalties.gather(batch.reqs, written, self.vocab_size)
        with _replacing_penalties(info, gathered):
            result = super().forward_batch_generation(batch, *args, **kwargs)
        tokens = result.next_token_ids.long()[:, None]
        penalties.count(gathered, tokens, torch.ones_like(written))
        return result

    def _begin(self, batch: Any) -> Step:
        step = Step(batch, batch.seq_lens.long())
        info = batch.sampling_info
        if info is None:
            return step
        device = torch.device(self.device)
        if not info.is_all_greedy:
            given = sampling.given_seeds(batch.reqs, device)
            step.params = sampling.tensors(info, self.noise.seeds(given, len(batch.reqs)))
        if penalties.are_asked_for(info):
            prompts = penalties.to_device([len(r.origin_input_ids) for r in batch.reqs], device)
            step.penalties = penalties.gather(
                batch.reqs, step.anchors + 1 - prompts, self.vocab_size
            )
        return step

    def init_attention_backends(self) -> None:
        """The back ends of both models, ready to be captured."""
        super().init_attention_backends()
        device = torch.device(self.device)
        target, drafter = self.target_worker.model_runner, self.draft_model_runner
        attention = triton_attention.install(target.attn_backend, device)
        triton_attention.install(drafter.attn_backend, device)
        self.widths = widths_of(
            self.info,
            target,
            self.block_size,
            device,
            attention,
            agree=agreement(get_tp_group()),
            keeps_state=getattr(self, "_need_mamba_verify_commit", False),
        )
        if self.widths is not None:
            drafter.forward = skipping(drafter.forward, self)
            metrics.listen(self.widths)
        if kernels.available(device) and triton_attention.is_plain(drafter.token_to_kv_pool):
            self.graph_injects = True
            target.capture_tail_hooks.append(self.capture_injection)

    def init_cuda_graphs(self) -> None:
        """Graphs of the draft pass, and of the target's passes of fewer rows."""
        super().init_cuda_graphs()
        if self.widths is not None:
            self.widths.capture(self.target_worker.model_runner, self.draft_model_runner)

    # Drafting.

    def drafting_rows(self, hidden: Tensor) -> Tensor:
        """Rows [B * K, hidden] that draft, of block rows [B * block, hidden]."""
        rows = hidden.view(-1, int(self.block_size), hidden.shape[-1])[:, 1:]
        return rows.reshape(-1, hidden.shape[-1])

    def drafting(self, hidden: Tensor, anchors: Tensor) -> Drafting:
        """What drafts are made by, of rows [B * K, hidden] and anchors int64 [B]."""
        selects = self.info.config.selector is not None
        found = self.draft_model.candidates(hidden) if selects else None
        return Drafting(hidden, anchors, found)

    def choose_drafts(self, drafting: Drafting) -> Tensor:
        """The likeliest drafts int64 [B * K]; notes how likely they are."""
        if drafting.candidates is not None:
            return self._walk(drafting).tokens.flatten()
        if self.widths is None:
            return self.draft_model.top_tokens(drafting.hidden)
        choice = self.draft_model.best_choice(drafting.hidden)
        self.widths.chances.predict(choice.logits[:, 0], choice.log_sum_exp)
        return choice.tokens[:, 0]

    def draws_drafts(self, step: Step) -> bool:
        """Whether the drafts of a pass are drawn instead of chosen."""
        return step.params is not None and self.info.options.draft_sampling == "probabilistic"

    def draw_drafts(self, drafting: Drafting, step: Step) -> Tensor:
        """Drafts int64 [B * K], drawn from the drafter's distribution for each request.

        A selector draws at their temperature alone, in place of what it chose in a captured pass.

        Args:
            drafting: of the step's requests.
            step: takes the probabilities.
        """
        assert step.params is not None
        hidden, anchors, found = drafting
        drafter, batch = self.draft_model.drafter, len(anchors)
        if found is not None:
            u = selector_noise(step.params.seed, step.anchors, self.num_drafts)
            path = self._walk(drafting, step.params.temperature, u)
            assert path.probs is not None
            step.draft_probs = drafter.target_probabilities(
                path.probs, self.vocab_size, found.tokens.view(path.probs.shape)
            )
            return path.tokens.flatten()
        logits = self.draft_model.logits(hidden).view(batch, self.num_drafts, -1)
        probs = sampling.distribution(logits, step.params, step.batch.sampling_info)
        places = step.anchors[:, None] + torch.arange(1, self.num_drafts + 1, device=logits.device)
        drawn = sample(probs, noise(step.params.seed, places))
        step.draft_probs = drafter.target_probabilities(probs, self.vocab_size)
        return drafter.token_ids(drawn).flatten()

    def _walk(
        self, drafting: Drafting, temperature: Tensor | None = None, u: Tensor | None = None
    ) -> Path | Proposal:
        """The selector's path; notes how likely its drafts are."""
        assert drafting.candidates is not None
        found, anchors = drafting.candidates, drafting.anchors
        path = select_drafts(self.draft_model.drafter, found, anchors, temperature, u)
        if self.widths is not None:
            self.widths.chances.predict(path.confidence.flatten(), None)
        return path

    def _greedy_sample_from_vocab_parallel_head(
        self, *, hidden_states: Tensor, lm_head: Any, chunk_size: int = 256
    ) -> Tensor:
        """Drafts int64 [B * K] of a pass that ran outside a graph."""
        step = self.step
        if self.skips_draft:
            return hidden_states.new_zeros(len(hidden_states), dtype=torch.int64)
        # The blocks that SGLang's worker has just made.
        anchors = self._draft_block_ids_buf[: len(hidden_states) // self.num_drafts, 0]
        drafting = self.drafting(hidden_states, anchors)
        if step is None or not self.draws_drafts(step):
            return self.choose_drafts(drafting)
        if self.widths is not None and drafting.candidates is None:
            self.choose_drafts(drafting)
        return self.draw_drafts(drafting, step)

    def _maybe_build_draft_sampler(self) -> DraftGraphHead:
        """The head at the end of the captured draft pass."""
        return DraftGraphHead(self, max(MAX_CAPTURED, self.model_runner.req_to_token_pool.size))

    # Injection.

    def capture_injection(self, runner: Any, out: Any, batch: Any, rows: int) -> None:
        """Inject at the end of a captured verify pass, before the host knows what is accepted.

        Rejected rows are written too: they lie behind every committed one, and the next pass writes
        them again before it reads that far. Padding's rows go to the slot that nothing reads.

        Args:
            runner: SGLang's, of the graph.
            out: the pass's ``LogitsProcessorOutput``.
            batch: the graph's inputs.
            rows: of the graph.
        """
        hidden = getattr(out, "hidden_states", None)
        if hidden is None:  # Without features in every graph, injection stays outside of all.
            self.graph_injects = False
        elif self.graph_injects:
            self.inject(hidden[:rows], batch.positions[:rows], batch.out_cache_loc[:rows])

    def inject(
        self, features: Tensor, positions: Tensor, slots: Tensor, committed: Tensor | None = None
    ) -> None:
        """Write context rows to the drafter's cache; arguments as ``EngineDrafter.inject``'s."""
        with torch.inference_mode():
            self.draft_model.inject(
                features,
                positions.long(),
                slots.long(),
                self.draft_model_runner.token_to_kv_pool,
                committed,
            )

    def _init_fused_kv_helper(self) -> None:
        """SGLang's own injection is not used."""
        self._use_fused_kv_materialize = False
        self._fused_kv_helper = None

    def _append_target_hidden_to_draft_kv_by_loc(
        self,
        *,
        target_hidden: Tensor,
        cache_loc: Tensor,
        positions: Tensor,
        cache_loc_2d: Tensor | None = None,
        commit_lens: Tensor | None = None,
        **_: Any,
    ) -> None:
        """KV injection of a prompt's rows, or of a verify pass's committed rows."""
        if commit_lens is not None:
            if self.widths is not None:
                self.widths.learn(commit_lens)
            if self.in_graph and self.graph_injects:
                return
        rows = cache_loc.numel()
        if rows > 0:
            # Rows beyond are padding of the target's pass.
            self.inject(target_hidden[:rows], positions, cache_loc, commit_lens)

    # Verification.

    def _validate_phase1_sampling_support(self, batch: Any) -> None:
        """Every device samples."""

    def _can_skip_verify_logits(self, batch: Any, sampling_info: Any) -> bool:
        """Whether the argmax alone will do (0.5.23)."""
        plain = self.step is None or (self.step.penalties is None and self.step.params is None)
        return plain and bool(super()._can_skip_verify_logits(batch, sampling_info))

    def _resolve_mask_token_id(self, **_: Any) -> int:
        """What fills a block; the model puts in a mask that the target's vocabulary lacks."""
        mask = self.info.config.mask_token_id
        return mask if mask < self.target_worker.model_runner.model_config.vocab_size else 0

    def _maybe_merge_trained_mask_embedding(self) -> None:
        """The drafter keeps its mask vector to itself instead of changing the target's table."""

    def adjust_logits(self, logits: Tensor, info: Any, rows: int) -> None:
        """Apply what the target's own sampling applies to its logits, in place.

        Args:
            logits: [B * rows, V].
            info: SGLang's ``SamplingBatchInfo``.
            rows: of a block.
        """
        step = self.step
        assert step is not None
        batch = len(step.batch.reqs)
        blocks = logits.view(batch, rows, -1)
        if step.penalties is not None:
            # Those that were not verified are -1, and nothing comes of their rows.
            drafts = self._draft_block_tokens_buf[:batch, 1:].clamp(min=0)
            if blocks.dtype == torch.float32:
                step.penalties.apply(blocks, drafts)
            else:
                penalized = blocks.float()
                step.penalties.apply(penalized, drafts)
                blocks.copy_(penalized)
        if info.logit_bias is not None:
            blocks += info.logit_bias[:, None].to(blocks.dtype)
        if info.has_custom_logit_processor:
            apply_custom_logit_processor(logits, info, num_tokens_in_batch=rows)

    def accept(self, candidates: Tensor, logits: Tensor, info: Any) -> tuple[Tensor, Tensor]:
        """Verify a batch that has requests that sample.

        Args:
            candidates: int64 [B, block], anchor and drafts.
            logits: [B * block, V], the target's, adjusted.
            info: SGLang's ``SamplingBatchInfo``.

        Returns:
            Accepted drafts int32 [B], and the token after them int64 [B].
        """
        step = self.step
        assert step is not None
        assert step.params is not None
        batch, rows = candidates.shape
        cut, places = None if self.widths is None else self.widths.cut, None
        if cut is None:
            target = sampling.distribution(logits.view(batch, rows, -1), step.params, info)
        else:  # A distribution of rows that were not verified would be made for nothing.
            params, places = step.params.of_rows(cut.sources // rows), cut.indices.view(batch, rows)
            target = sampling.distribution(logits[cut.sources][:, None], params, info)[:, 0]
        draft = None if step.draft_probs is None else step.draft_probs.contiguous()
        judged = Sampled(target.contiguous(), draft, step.params.seed, places)
        accepted = accept(candidates[:, 1:], judged, step.anchors)
        return accepted.num_accepted, accepted.next_token


class _routing_to:
    """Names the worker whose pass runs, for the functions that SGLang's worker calls by name."""

    current: Worker | None = None

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def __enter__(self) -> None:
        _routing_to.current = self.worker

    def __exit__(self, *_: object) -> None:
        _routing_to.current = None


class _replacing_penalties:
    """Gives a prefill's sampler the penalties of what its requests have already written."""

    def __init__(self, info: Any, gathered: penalties.Penalties) -> None:
        self.info, self.gathered = info, gathered

    def __enter__(self) -> None:
        info, gathered = self.info, self.gathered
        self.kept = info.penalizer_orchestrator
        info.penalizer_orchestrator = None
        additive = -(
            gathered.frequency * gathered.counts + gathered.presence * (gathered.counts > 0)
        )
        if gathered.stop is not None:
            additive.masked_fill_((gathered.remaining > 0) & gathered.stop, float("-inf"))
        info.acc_additive_penalties = additive
        info.acc_scaling_penalties = torch.where(gathered.counts > 0, gathered.repetition, 1.0)

    def __exit__(self, *_: object) -> None:
        self.info.penalizer_orchestrator = self.kept
        penalties.without_native(self.info)


def _route(module: ModuleType) -> None:
    """Let the functions by which SGLang's worker verifies ask our worker while its pass runs.

    They have one signature from 0.5.16 to 0.5.23, where the body around them changed every release.
    """
    native = cast(Any, module)
    if hasattr(native.apply_dflash_verify_logits_adjustments, "__wrapped__"):
        return
    route_inputs(native, lambda: _routing_to.current)

    def routed(function: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            worker = _routing_to.current
            return function(*args, **kwargs) if worker is None else ours(worker, *args, **kwargs)

        return call

    def adjust(
        worker: Worker, *, next_token_logits: Tensor, sampling_info: Any, draft_token_num: int
    ) -> None:
        worker.adjust_logits(next_token_logits, sampling_info, draft_token_num)

    def accept(
        worker: Worker,
        *,
        candidates: Tensor,
        next_token_logits: Tensor,
        sampling_info: Any,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        return worker.accept(candidates, next_token_logits, sampling_info)

    for name, ours in (
        ("apply_dflash_verify_logits_adjustments", adjust),
        ("compute_dflash_sampling_correct_drafts_and_bonus", accept),
        ("is_dflash_sampling_verify_available", lambda worker: True),
    ):
        setattr(native, name, routed(getattr(native, name), ours))


def _note_graphs(worker: Worker) -> None:
    """Keep whether the target's last pass was a captured one, which SGLang's worker knows alone.

    What a cut pass gives is laid out like whole blocks, before the worker looks at it.
    """
    target = worker.target_worker
    native = target.forward_batch_generation

    @wraps(native)
    def forward(*args: Any, **kwargs: Any) -> Any:
        result = native(*args, **kwargs)
        worker.in_graph = bool(getattr(result, "can_run_cuda_graph", False))
        if worker.widths is not None:
            worker.widths.widen(
                result.logits_output,
                worker._draft_block_tokens_buf,
                features=not (worker.in_graph and worker.graph_injects),
            )
        return result

    target.forward_batch_generation = forward


def _seed_first_tokens(runner: Any, noise: sampling.Noise) -> None:
    """Draw the token after a prompt with its request's seed, where it gave one.

    SGLang reads seeds only under --enable-deterministic-inference.
    """
    native = runner.sample

    @wraps(native)
    def sample(logits_output: Any, forward_batch: Any) -> Any:
        info = forward_batch.sampling_info
        given = getattr(info, sampling.SEEDS, None)
        if given is None or forward_batch.return_logprob or info.has_custom_logit_processor:
            return native(logits_output, forward_batch)
        runner._preprocess_logits(logits_output, info)
        logits = logits_output.next_token_logits[:, None]
        params = sampling.tensors(info, noise.seeds(given, logits.shape[0]))
        probs = sampling.distribution(logits, params, info)
        places = forward_batch.seq_lens.long()[:, None]
        return sampling.draw(probs, params, places, Stream.NEXT)[:, 0]

    runner.sample = sample
