"""The DFLASH worker: SGLang's own, around this project's drafter.

Scheduling, block preparation, verify passes, CUDA graphs and publishing are inherited. Replaced
are the drafter, KV injection, drafting from the head, acceptance of requests that sample,
penalties, how many rows of a block are verified (``adaptive``), and the attention of blocks
(``block_attention``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank, get_tp_group
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.checkpoints.updates import holds_drafter
from dflash_plugin.kernels.accept import Sampled, accept
from dflash_plugin.kernels.accept_block import accept_block
from dflash_plugin.kernels.accept_greedy import accept_greedy
from dflash_plugin.kernels.draw_tokens import draw_tokens
from dflash_plugin.serving.compile_beside import compile_beside
from dflash_plugin.serving.draft_tokens import block_noise, select_drafts
from dflash_plugin.serving.new_weights import route
from dflash_plugin.serving.prometheus import WORKER_FACTS
from dflash_plugin.serving.ranks import agree_across_ranks, any_across_ranks
from dflash_plugin.serving.start_times import StartTimes
from dflash_plugin.serving.time_limit import time_limit
from dflash_plugin.sglang import (
    block_attention,
    metrics,
    patches,
    penalties,
    recurrent_verify,
    sampling,
)
from dflash_plugin.sglang.adaptive import (
    AdaptiveVerifier,
    CutPass,
    build_verifier,
)
from dflash_plugin.sglang.compat import argument, current
from dflash_plugin.sglang.draft_estimate import DraftEstimate, Lesson
from dflash_plugin.sglang.draft_step import DraftGraphHead, Drafting, Step
from dflash_plugin.sglang.host_copies import send_without_waiting
from dflash_plugin.sglang.launches_to_come import launch_drafter, launch_verify_passes
from dflash_plugin.sglang.model import EngineDrafter
from dflash_plugin.sglang.new_weights import (
    KEPT,
    REPLACED,
    DraftUpdater,
    TargetUpdater,
    check_restorable,
)
from dflash_plugin.sglang.options import draft_model_path, required_spec
from dflash_plugin.sglang.prompt_graphs import capture_prompts
from dflash_plugin.sglang.protocols import (
    LogitsOutputLike,
    ModelRunnerLike,
    SamplingInfoLike,
    ScheduleBatchLike,
)
from dflash_plugin.sglang.seams.features import (
    ADAPTIVE,
    ADAPTIVE_GRAPHS,
    ADAPTIVE_RECURRENT,
    ALWAYS,
    BLOCK_ATTENTION,
    FLASH_ATTENTION,
    FLASHINFER,
    PROMPT_GRAPHS,
    TRITON,
)
from dflash_plugin.sglang.short_blocks import ShortBlocks
from dflash_plugin.sglang.surface import verify_features
from dflash_plugin.sglang.verify_state import verify_state

if TYPE_CHECKING:
    from dflash_plugin.drafter.selector import Proposal
    from dflash_plugin.kernels.select_path import Limits, Path

# What the attention of blocks needs of SGLang, by the name of the back end.
BACKEND_FEATURES = {
    block_attention.TRITON: TRITON,
    block_attention.FLASH_ATTENTION: FLASH_ATTENTION,
    block_attention.FLASHINFER: FLASHINFER,
}
# Seconds; the capture takes half a minute.
CAPTURE_LIMIT = 900
WITHOUT_ADAPTIVE = "DFLASH_PLUGIN_ADAPTIVE_VERIFICATION=0"
# The largest batch that is captured, unless the server runs more requests at once.
MAX_CAPTURED = 1024

logger = logging.getLogger(__name__)


class Worker(metrics.Counted, DFlashWorkerV2):
    """Drives the staged drafter; takes whatever constructor arguments SGLang's version passes."""

    _use_triton_accept_bonus: bool
    # The target's, which SGLang's worker does not see while a pass is cut.
    _cut_processor: Any = None
    _target_logits_processor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.start_times = StartTimes()
        self.start_times.compilations.watch()
        self.step: Step | None = None
        server_args = kwargs.get("server_args", args[0] if args else None)
        self.info = required_spec(draft_model_path(server_args))
        if argument(server_args, "device") == "cpu":
            from dflash_plugin.sglang.cpu.setup import install

            install()
        patches.route_verification()
        send_without_waiting()
        verify_features(ALWAYS)
        super().__init__(*args, **kwargs)
        self.draft_model: EngineDrafter
        self.draft_model.bind(self.target_worker.model_runner.model)
        self.draft_model.set_block_size(self.block_size)
        self.estimate: DraftEstimate | None = None
        if self.info.options.draft_sampling == "auto":
            self.estimate = DraftEstimate(self.num_drafts, torch.device(self.device))
        self.noise = sampling.Noise(
            int(argument(server_args, "random_seed") or 0), torch.device(self.device)
        )
        self.vocab_size = int(self.target_worker.model_runner.model_config.vocab_size)
        self.graph_injects, self.in_graph = False, False
        self._take_new_weights()
        patches.watch_target_passes(self)
        patches.skip_unread_embedding(
            self, self.target_worker.model_runner.model, self.draft_model_runner
        )
        patches.seed_first_tokens(self.target_worker.model_runner, self.noise)

    def _take_new_weights(self) -> None:
        """Stand in front of both runners' loaders of new weights."""
        target, drafter = self.target_worker.model_runner, self.draft_model_runner
        check_restorable(self.server_args, self.draft_model)
        route(target.model, self.draft_model)
        target.weight_updater = TargetUpdater(target.weight_updater, self.draft_model)
        drafter.weight_updater = DraftUpdater(drafter.weight_updater, self.draft_model)

    @property
    def num_drafts(self) -> int:
        """Drafts of a block, the anchor not counted, whether they are verified or not."""
        return int(self.block_size) - 1

    @property
    def draft_len(self) -> int:
        """Rows of a block, the anchor included, in the draft pass that runs."""
        return int(self.block_size) if self.verifier is None else self.verifier.draft_len

    @property
    def short_blocks(self) -> ShortBlocks | None:
        """What runs the draft pass, where it drafts shorter blocks."""
        verifier = self.verifier
        return None if verifier is None else verifier.running_short

    @property
    def facts(self) -> dict[str, str]:
        """Attention back ends in use, and whether drafts replay a CUDA graph."""
        target, drafter = self.target_worker.model_runner, self.draft_model_runner
        backends = (type(runner.attn_backend).__name__ for runner in (target, drafter))
        # SGLang may put the runner without graphs in the place of the one with.
        graphs = drafter.decode_cuda_graph_runner
        is_eager = graphs is None or graphs is drafter.eager_runner
        values = (*backends, "no" if is_eager else "yes")
        return dict(zip(WORKER_FACTS, values, strict=True))

    @property
    def skips_draft(self) -> bool:
        """Whether the pass that runs verifies no draft."""
        return self.verifier is not None and self.verifier.skips_draft

    def forward_batch_generation(self, batch: ScheduleBatchLike, *args: Any, **kwargs: Any) -> Any:
        """Run one pass over a batch: a prefill, or draft, verify and inject."""
        self.draft_model.follow_target()
        decodes = not (batch.forward_mode.is_extend() or batch.is_extend_in_batch)
        if self.verifier is not None:
            if batch.forward_mode.is_idle():
                self.verifier.policy.leave()
            elif not decodes:
                self.verifier.policy.read_prompts(len(batch.reqs), len(batch.out_cache_loc))
        if not decodes:
            return self._prefill(batch, *args, **kwargs)
        if batch.forward_mode.is_idle() or batch.spec_info is None:
            return super().forward_batch_generation(batch, *args, **kwargs)
        self.step = self._begin(batch)
        verifying: Any = nullcontext()
        if self.verifier is not None:
            verifying = self.verifier.verifying(self, batch)
        with patches.routing_to(self), verifying, self._accepting():
            try:
                result = super().forward_batch_generation(batch, *args, **kwargs)
                if self.verifier is not None:
                    setattr(result, metrics.ROWS, self.verifier.verify_len)
            finally:
                step, self.step = self.step, None
        if step is not None and step.penalties is not None:
            tokens = result.next_token_ids.view(len(batch.reqs), -1)
            penalties.count(step.penalties, tokens, result.accept_lens.long())
        return result

    @contextmanager
    def _accepting(self) -> Iterator[None]:
        """Let SGLang's body call our acceptance, not its own kernel, in a cut pass."""
        if self.verifier is None or self.verifier.num_rows is None:
            yield
            return
        kept, self._use_triton_accept_bonus = self._use_triton_accept_bonus, False
        if current().defers_gather:  # We gather the logits of a cut pass.
            self._cut_processor, self._target_logits_processor = self._target_logits_processor, None
        try:
            yield
        finally:
            self._use_triton_accept_bonus = kept
            if current().defers_gather:
                self._target_logits_processor, self._cut_processor = self._cut_processor, None

    def _prefill(self, batch: ScheduleBatchLike, *args: Any, **kwargs: Any) -> Any:
        info = batch.sampling_info
        if info is None or batch.forward_mode.is_idle():
            return super().forward_batch_generation(batch, *args, **kwargs)
        device = torch.device(self.device)
        if not info.is_all_greedy:
            setattr(info, sampling.SEEDS, sampling.given_seeds(batch.reqs, device))
        if not penalties.are_asked_for(info):
            return super().forward_batch_generation(batch, *args, **kwargs)
        # Requests that decode in a mixed batch have their counts already, and the host may not know
        # their last tokens yet.
        decoding = {id(request) for request in batch.decoding_reqs or ()}
        new = [request for request in batch.reqs if id(request) not in decoding]
        penalties.begin(new, self.vocab_size, device)
        written = penalties.to_device([len(request.output_ids) for request in batch.reqs], device)
        gathered = penalties.gather(batch.reqs, written, self.vocab_size)
        with patches.replacing_penalties(info, gathered):
            result = super().forward_batch_generation(batch, *args, **kwargs)
        tokens = result.next_token_ids.long()[:, None]
        penalties.count(gathered, tokens, torch.ones_like(written))
        return result

    def _begin(self, batch: ScheduleBatchLike) -> Step:
        step = Step(batch, batch.seq_lens.long())
        info = batch.sampling_info
        if info is None:
            return step
        device = torch.device(self.device)
        if not info.is_all_greedy:
            given = sampling.given_seeds(batch.reqs, device)
            step.params = sampling.tensors(info, self.noise.seeds(given, len(batch.reqs)))
            step.seeded = torch.zeros_like(step.params.seed, dtype=torch.bool)
            if given is not None:
                step.seeded = given >= 0
        if penalties.are_asked_for(info):
            prompts = penalties.to_device([len(r.origin_input_ids) for r in batch.reqs], device)
            step.penalties = penalties.gather(
                batch.reqs, step.anchors + 1 - prompts, self.vocab_size
            )
        return step

    def init_attention_backends(self) -> None:
        """Make the attention back ends of both models, ready to be captured."""
        super().init_attention_backends()
        device = torch.device(self.device)
        target: ModelRunnerLike = self.target_worker.model_runner
        drafter = self.draft_model_runner
        self.pool_bytes = int(sum(drafter.token_to_kv_pool.get_kv_size_bytes()))
        logger.info("the drafter's KV pool takes %.2f GiB", self.pool_bytes / 2**30)
        state = verify_state(target.req_to_token_pool)
        if state is not None:
            self.verify_state_bytes = state.total
            logger.info("%s", state.describe())
        attention = block_attention.install(target, device)
        self._draft_attention = block_attention.install(drafter, device)
        recurrent = None
        if self._need_mamba_verify_commit:
            recurrent = recurrent_verify.obstacle(target.attn_backend)
        self.verifier = build_verifier(
            self.info,
            target,
            self.block_size,
            device,
            attention,
            agree=agree_across_ranks(get_tp_group()),
            on_any_rank=any_across_ranks(get_tp_group()),
            recurrent=recurrent,
        )
        features = set()
        if device.type == "cuda" and capture_prompts(target):
            features.add(PROMPT_GRAPHS)
        if attention is not None:
            features |= {BLOCK_ATTENTION, BACKEND_FEATURES[type(target.attn_backend).__name__]}
        if self.verifier is not None:
            features |= {ADAPTIVE, ADAPTIVE_GRAPHS} if device.type == "cuda" else {ADAPTIVE}
            patches.skip_unused_drafts(drafter, self)
            if recurrent_verify.install(target.attn_backend):
                features.add(ADAPTIVE_RECURRENT)
        verify_features(features)
        if kernels.available(device) and block_attention.is_plain(drafter.token_to_kv_pool):
            self.graph_injects = True
            self.target_worker.model_runner.capture_tail_hooks.append(self.capture_injection)
        if device.type == "cuda" and get_tensor_model_parallel_rank() == 0:
            # The target's passes over prompts are captured before any of these launches.
            with self.start_times.part("launches collected"):
                self.start_times.compiler = compile_beside(partial(self._launch_all, attention))

    def _launch_all(self, attention: block_attention.BlockAttention | None) -> None:
        """Launch what captured passes will launch; ``attention`` is the target's."""
        rows, verifier, target = [int(self.block_size)], self.verifier, self.target_worker
        if verifier is not None and verifier.budget.short is not None:
            rows.append(verifier.budget.short)
        size = int(target.model_runner.req_to_token_pool.size)
        if attention is not None:
            model = target.model_runner.model
            launch_verify_passes(attention, model, verifier, rows[0], size)
        launch_drafter(self.draft_model, self.draft_model_runner, self._draft_attention, rows, size)

    def init_cuda_graphs(self) -> None:
        """Capture the draft pass, and the target's passes of fewer rows than a block."""
        part = self.start_times.part
        if self.verifier is not None:
            with part("whole verify passes timed"):
                self.verifier.measure(self.target_worker.model_runner)
        with part("draft passes captured"):
            super().init_cuda_graphs()
        if self.verifier is not None:
            with time_limit(CAPTURE_LIMIT, "adaptive verification's capture", WITHOUT_ADAPTIVE):
                with part("shorter draft passes captured"):
                    self.verifier.draft_short_blocks(
                        self.draft_model_runner, self.draft_model, self._draft_attention
                    )
                with part("cut verify passes captured and timed"):
                    self.verifier.capture(self.target_worker.model_runner, self.draft_model_runner)
        logger.info("%s", self.start_times)

    # Up to SGLang 0.5.20, called once the target's worker has updated whichever of both it was.

    def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
        """What the target's worker has done."""
        return True, REPLACED if holds_drafter(recv_req.model_path) else KEPT

    def update_weights_from_ipc(self, recv_req: Any) -> tuple[bool, str]:
        """What the target's worker has done."""
        return True, KEPT

    # Drafting.

    def drafting_rows(self, hidden: Tensor) -> Tensor:
        """The rows [B * K, hidden] that draft, of all rows [B * draft_len, hidden] of blocks."""
        rows = hidden.view(-1, self.draft_len, hidden.shape[-1])[:, 1:]
        return rows.reshape(-1, hidden.shape[-1])

    def drafting(self, hidden: Tensor, anchors: Tensor) -> Drafting:
        """Prepare to make drafts from rows [B * K, hidden] and anchor tokens int64 [B]."""
        selects = self.info.config.selector is not None
        found = self.draft_model.candidates(hidden) if selects else None
        return Drafting(hidden, anchors, found)

    def choose_drafts(self, drafting: Drafting) -> Tensor:
        """The likeliest drafts int64 [B * K]; tells the verifier how likely they are."""
        if drafting.candidates is not None:
            return self._walk(drafting).tokens.flatten()
        verifier = self._predicting(len(drafting.anchors))
        if verifier is None:
            return self.draft_model.top_tokens(drafting.hidden)
        choice = self.draft_model.best_choice(drafting.hidden)
        verifier.predictor.predict(choice.logits[:, 0], choice.log_sum_exp, self.draft_len - 1)
        return choice.tokens[:, 0]

    def _predicting(self, requests: int) -> AdaptiveVerifier | None:
        """The verifier, where it wants to know how likely the drafts of a batch are."""
        verifier = self.verifier
        return verifier if verifier is not None and verifier.predicts(requests) else None

    def draws_drafts(self, step: Step) -> bool:
        """Whether the drafts of a step are drawn from a distribution instead of chosen."""
        return step.params is not None and self.info.options.draft_sampling != "greedy"

    def draw_drafts(self, drafting: Drafting, step: Step) -> Tensor:
        """Draw drafts int64 [B * K] from the drafter's distribution for each request.

        A selector draws within the request's top-k, top-p and min-p, too. With an estimate, the
        distributions are those that it chooses.

        Args:
            drafting: the output of the step's draft pass.
            step: its ``draft_probs`` are set.
        """
        params, info = step.params, step.batch.sampling_info
        assert params is not None
        assert step.seeded is not None
        hidden, anchors, found = drafting
        drafter, batch, drafts = self.draft_model.drafter, len(anchors), self.draft_len - 1
        factors = requests = None
        if self.estimate is not None:
            factors = self.estimate.factors(params, step.seeded)
            requests = self.estimate.learnt_from(batch)
        if factors is not None:
            factors = factors[:, :drafts]
        u = block_noise(params.seed, step.anchors, drafts)
        if found is not None:
            within = sampling.limits(params, info, factors)
            path = self._walk(drafting, params.temperature, u, within)
            assert path.probs is not None
            scores, step.draft_probs = path.scores, path.probs
            step.draft_candidates = found.tokens.view(path.probs.shape)
            tokens = path.tokens
        else:
            scores = self.draft_model.logits(hidden).view(batch, drafts, -1)
            probs = sampling.distribution(scores, params, info, factors)
            step.draft_probs = drafter.target_probabilities(probs, self.vocab_size)
            tokens = drafter.token_ids(draw_tokens(probs, u))
        if requests is not None:
            own = sampling.distribution(scores[requests], params.of_rows(requests), info)
            if found is None:
                own = drafter.target_probabilities(own, self.vocab_size)
            step.lesson = Lesson(requests, own)
        return tokens.flatten()

    def _walk(
        self,
        drafting: Drafting,
        temperature: Tensor | None = None,
        u: Tensor | None = None,
        limits: Limits | None = None,
    ) -> Path | Proposal:
        """Let the selector choose among candidates; tells the verifier how likely drafts are."""
        assert drafting.candidates is not None
        found, anchors = drafting.candidates, drafting.anchors
        path = select_drafts(self.draft_model.drafter, found, anchors, temperature, u, limits)
        verifier = self._predicting(len(anchors))
        if verifier is not None:
            verifier.predictor.predict(path.confidence.flatten(), None, self.draft_len - 1)
        return path

    def _greedy_sample_from_vocab_parallel_head(
        self, *, hidden_states: Tensor, lm_head: Any, chunk_size: int = 256
    ) -> Tensor:
        """Drafts int64 [B * K] of a draft pass that ran outside of a CUDA graph."""
        step = self.step
        if self.skips_draft:
            return hidden_states.new_zeros(len(hidden_states), dtype=torch.int64)
        # SGLang's worker has just written the blocks of this pass here.
        anchors = self._draft_block_ids_buf[: len(hidden_states) // self.num_drafts, 0]
        short = self.short_blocks
        if short is not None:
            hidden_states = short.made_rows(hidden_states)
        drafting = self.drafting(hidden_states, anchors)
        if step is None or not self.draws_drafts(step):
            made = self.choose_drafts(drafting)
        else:
            if drafting.candidates is None and self._predicting(len(anchors)) is not None:
                self.choose_drafts(drafting)
            made = self.draw_drafts(drafting, step)
        return made if short is None else short.whole_drafts(made, len(anchors))

    def _maybe_build_draft_sampler(self) -> DraftGraphHead:
        """The head that SGLang captures at the end of the draft pass."""
        return DraftGraphHead(self, max(MAX_CAPTURED, self.model_runner.req_to_token_pool.size))

    # Injection.

    def capture_injection(self, runner: Any, out: LogitsOutputLike, batch: Any, rows: int) -> None:
        """Inject at the end of a captured verify pass, before the host knows what is accepted.

        Rejected rows are written too. They lie behind every committed row, and the next pass
        writes them again before it reads that far. Rows of padding go to the slot that nothing
        reads.

        Args:
            runner: SGLang's runner of the graph; unused.
            out: of the pass.
            batch: the ``ForwardBatch`` that holds the graph's inputs.
            rows: of the graph, padding included.
        """
        hidden = out.hidden_states
        if hidden is None:  # Without features in every graph, injection stays outside of all.
            self.graph_injects = False
        elif self.graph_injects:
            self.inject(hidden[:rows], batch.positions[:rows], batch.out_cache_loc[:rows])

    def inject(
        self, features: Tensor, positions: Tensor, slots: Tensor, committed: Tensor | None = None
    ) -> None:
        """Write context rows to the drafter's cache; see ``EngineDrafter.inject`` for arguments."""
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
        """Inject a prompt's rows, or the committed rows of a verify pass."""
        if commit_lens is not None:
            if self.verifier is not None:
                self.verifier.learn(commit_lens)
            if self.in_graph and self.graph_injects:
                return
            if self._cut is not None:
                # Rejected rows lie behind every committed row, and are written again.
                cut, hidden = self._cut.rows, self._cut.hidden
                assert hidden is not None
                self.inject(hidden[: len(cut.slots)], cut.positions, cut.slots)
                return
        rows = cache_loc.numel()
        if rows > 0:
            # Further rows are padding of the target's pass.
            self.inject(target_hidden[:rows], positions, cache_loc, commit_lens)

    # Verification.

    def _validate_phase1_sampling_support(self, batch: Any) -> None:
        """Accept every batch: sampling is ours and runs on every device."""

    def _can_skip_verify_logits(
        self, batch: ScheduleBatchLike, sampling_info: SamplingInfoLike
    ) -> bool:
        """Whether the argmax of the logits is enough for this pass."""
        plain = self.step is None or (self.step.penalties is None and self.step.params is None)
        return plain and bool(super()._can_skip_verify_logits(batch, sampling_info))

    def _resolve_mask_token_id(self, **_: Any) -> int:
        """The token that fills a block behind its anchor.

        The draft model itself puts in a mask token that lies outside of the target's vocabulary.
        """
        mask = self.info.config.mask_token_id
        return mask if mask < self.target_worker.model_runner.model_config.vocab_size else 0

    def _maybe_merge_trained_mask_embedding(self) -> None:
        """Leave the target's embedding as it is: the drafter holds its own mask vector."""

    @property
    def _cut(self) -> CutPass | None:
        """The cut pass that runs, or None."""
        return None if self.verifier is None else self.verifier.cut

    def _cut_logits(self, cut: CutPass) -> Tensor:
        """The target's logits [N, V] of a cut pass, gathered from the ranks."""
        logits = cut.logits
        assert logits is not None
        processor = self._cut_processor
        if processor is not None and processor.is_deferred_shard(logits):
            logits = cut.logits = processor.finish_deferred_gather(logits)
        return logits

    def adjust_logits(self, logits: Tensor, info: SamplingInfoLike, rows: int) -> None:
        """Apply what the target's own sampling applies to its logits, in place.

        Args:
            logits: [B * rows, V]; of a cut pass a placeholder.
            info: of the batch.
            rows: rows of a block.
        """
        step, cut = self.step, self._cut
        assert step is not None
        if step.penalties is None and info.logit_bias is None:
            if info.has_custom_logit_processor:
                apply_custom_logit_processor(logits, info, num_tokens_in_batch=rows)
            return
        batch = len(step.batch.reqs)
        if cut is not None:
            logits, sources = self._cut_logits(cut), cut.rows.sources
        else:
            sources = torch.arange(batch * rows, device=logits.device)
        requests = sources // rows
        if step.penalties is not None:
            # Drafts that were not verified are -1; the rows behind them are never used.
            drafts = self._draft_block_tokens_buf[:batch, 1:].clamp(min=0)
            penalized = logits.float()
            step.penalties.apply(penalized, drafts, requests, sources % rows)
            if penalized is not logits:
                logits.copy_(penalized)
        if info.logit_bias is not None:
            logits += info.logit_bias[requests].to(logits.dtype)
        if info.has_custom_logit_processor:
            apply_custom_logit_processor(logits, info, num_tokens_in_batch=rows)

    def accept(
        self, candidates: Tensor, logits: Tensor, info: SamplingInfoLike
    ) -> tuple[Tensor, Tensor]:
        """Verify a batch with requests that sample: drawn blocks whole, chosen drafts one by one.

        Args:
            candidates: int64 [B, block], anchor and drafts.
            logits: [B * block, V], the target's, after ``adjust_logits``; of a cut pass a
                placeholder.
            info: of the batch.

        Returns:
            Number of accepted drafts int32 [B], and the token after them int64 [B].
        """
        step, cut, row_index = self.step, self._cut, None
        assert step is not None
        assert step.params is not None
        batch, rows = candidates.shape
        if cut is None:
            target = sampling.distribution(logits.view(batch, rows, -1), step.params, info)
        else:
            params = step.params.of_rows(cut.rows.sources // rows)
            row_index = cut.rows.indices.view(batch, rows)
            target = sampling.distribution(self._cut_logits(cut)[:, None], params, info)[:, 0]
        draft, tokens = (
            None if part is None else part.contiguous()
            for part in (step.draft_probs, step.draft_candidates)
        )
        if draft is not None and draft.shape[1] < rows - 1:
            # Drafts of a shorter block; behind them, none was made.
            assert row_index is not None
            made = draft.shape[1] + 1
            candidates, row_index = candidates[:, :made], row_index[:, :made].contiguous()
        judged = Sampled(target.contiguous(), draft, step.params.seed, row_index, tokens)
        judge = accept if draft is None else accept_block
        accepted = judge(candidates[:, 1:], judged, step.anchors)
        if self.estimate is not None and step.lesson is not None:
            assert step.seeded is not None
            self.estimate.learn(step.lesson, judged, accepted, step.params, step.seeded)
        return accepted.num_accepted, accepted.next_token

    def accept_greedy(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Verify a cut pass without requests that sample.

        Args:
            candidates: int64 [B, block], anchor and drafts, -1 where a draft was not verified.

        Returns:
            Number of accepted drafts int32 [B], and the token after them int64 [B].
        """
        cut = self._cut
        assert cut is not None
        best = self._cut_logits(cut).argmax(dim=-1)
        accepted = accept_greedy(candidates[:, 1:], best, cut.rows.indices.view(candidates.shape))
        return accepted.num_accepted, accepted.next_token
