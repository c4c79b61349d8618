"""The V2 runner's speculator: vLLM's own class around this project's drafter.

Staging, metadata and CUDA graphs of injection and draft are inherited. The model and the layout of
its block are replaced.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.predict_acceptance import predict_acceptance
from dflash_plugin.serving.adaptive_setup import short_block
from dflash_plugin.serving.compile_beside import compile_beside
from dflash_plugin.serving.draft_tokens import block_noise, select_drafts
from dflash_plugin.serving.launches_to_come import launch_products
from dflash_plugin.serving.new_weights import route
from dflash_plugin.serving.start_times import StartTimes
from dflash_plugin.vllm import adaptive, compat
from dflash_plugin.vllm.draft_logits import DraftLogits
from dflash_plugin.vllm.model import EngineDrafter
from dflash_plugin.vllm.options import required_spec
from dflash_plugin.vllm.protocols import AcceptanceEstimator, InputBatch, KVCacheConfig, VllmConfig
from dflash_plugin.vllm.request_limits import RequestLimits
from dflash_plugin.vllm.short_blocks import ShortBlocks
from dflash_plugin.vllm.surface import surface
from dflash_plugin.vllm.target import require_hidden_states

logger = logging.getLogger("vllm.dflash_plugin")

# Keeps the drafts' noise apart from that of vLLM's rejection sampler, which uses the same generator
# with the same seeds and positions.
SALT = 0x5EED_D4AF_7000_0001


class Speculator(DFlashSpeculator):
    """Drafts a block per request on the device, without a host wait."""

    _speculator_name = "dflash-plugin"
    model: EngineDrafter
    draft_logits: Tensor | None
    acceptance_estimator: AcceptanceEstimator | None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.start_times = StartTimes()
        self.start_times.compilations.watch()
        super().__init__(vllm_config, device)
        self.spec = required_spec(vllm_config)
        require_hidden_states(vllm_config.model_config)
        self.adaptive: adaptive.AdaptiveManager | None = None
        self.skips_drafts = compat.current().skips_drafts
        config = self.spec.config
        self.sample_from_anchor = config.sample_from_anchor
        self.num_query_per_req = self.num_speculative_steps + (not config.sample_from_anchor)
        self._avoid_logits()
        self.selector_logits: DraftLogits | None = None
        self.limits: RequestLimits | None = None
        if config.selector is not None and self.draft_logits is not None:
            # Free vLLM's tensor first, to use its memory.
            shape, self.draft_logits = self.draft_logits.shape, None
            self.selector_logits = DraftLogits(shape, config.selector.top_k, device)
            self.draft_logits = self.selector_logits.logits
            self.limits = RequestLimits(shape[0], device)
        self.short_blocks: ShortBlocks | None = None
        self.short_cudagraph_manager: Any = None
        short = short_block(self.num_speculative_steps + 1)
        # What drafts are drawn from is kept for whole blocks.
        if short is not None and self.draft_logits is None:
            self.short_blocks = ShortBlocks(self, short)

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        """The plugin's drafter, bound to the target."""
        model: EngineDrafter = super().load_draft_model(target_model, target_attn_layer_names)
        model.bind(target_model)
        route(target_model, model)
        return model

    def set_attn(
        self, model_state: Any, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        """Attach the paged cache.

        Raises:
            DFlashError: vLLM's speculator lacks an attribute, or layers that share a cache group
                differ in causality.
        """
        super().set_attn(model_state, kv_cache_config, *args, **kwargs)
        surface().verify_object(self)
        self.adaptive = adaptive.latest()
        if self.adaptive is not None:
            self.adaptive.start_times = self.start_times
            estimator = self._estimator()
            surface().verify_object(estimator)
            self.adaptive.acceptance_probs = estimator.predictions
            adaptive.compile_estimator(estimator, self.device)
        if self.adaptive is None or not (self.short_blocks and self.adaptive.draft_short_blocks()):
            self.short_blocks = None
        causal = dict(
            zip(
                self.model.get_draft_kv_cache_layer_names(),
                self.model.get_draft_attn_causal(),
                strict=True,
            )
        )
        kinds = [
            {causal[name] for name in group.layer_names if name in causal}
            for group in kv_cache_config.kv_cache_groups
        ]
        if any(len(kind) > 1 for kind in kinds):
            raise DFlashError(
                "the drafter has causal and non-causal layers with the same window, which "
                "vLLM keeps in one cache group and runs alike: use the Transformers engine"
            )
        # vLLM calls this twice where it first captures to see how much memory graphs take.
        is_first = self.start_times.compiler is None and get_tensor_model_parallel_rank() == 0
        if self.device.type == "cuda" and is_first:
            with self.start_times.part("launches collected"):
                self.start_times.compiler = compile_beside(self._launch_all)

    def _launch_all(self) -> None:
        """Launch what captured passes and steps will launch."""
        launch_products(self.model)
        if self.adaptive is None:
            return
        for requests in (16, 8, 4, 2, 1):
            rows = torch.zeros(requests * self.num_speculative_steps, device=self.device)
            nobody = torch.full(rows.shape, -1, device=self.device)
            self._predict(rows, rows, nobody, nobody.int())
        self.adaptive.selection.compile_ahead(self.adaptive.acceptance_probs)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Prepare to capture whole blocks and, where they are drafted, shorter ones."""
        super().init_cudagraph_manager(cudagraph_mode)
        if self.short_blocks is not None:
            self.short_cudagraph_manager = self.short_blocks.make_graphs(self)

    def capture(self) -> None:
        """Capture the draft passes."""
        with self.start_times.part("draft passes captured"):
            super().capture()
        if self.short_blocks is not None:
            with self.start_times.part("shorter draft passes captured"):
                self.short_blocks.capture(self, super().capture)
        if self.adaptive is None:
            logger.info("%s", self.start_times)

    def _generate_draft(self, *args: Any, **kwargs: Any) -> None:
        """Draft blocks of as many rows as the speculator is laid out for."""
        self.model.model.lay_out(self.num_query_per_req)
        super()._generate_draft(*args, **kwargs)

    def _estimator(self) -> AcceptanceEstimator:
        """vLLM's estimator, which it makes for adaptive verification."""
        assert self.acceptance_estimator is not None
        return self.acceptance_estimator

    def verify_whole_blocks(self) -> None:
        """Do without acceptance probabilities; called before the draft pass is captured."""
        self.enable_adaptive_verification = self.use_acceptance_estimator = False
        self.acceptance_estimator = None
        self._avoid_logits()

    def _avoid_logits(self) -> None:
        """Let the model find chosen drafts without logits, unless an estimator reads them."""
        if self.speculative_config.draft_sample_method != "probabilistic":
            self.use_local_argmax_reduction = not self.use_acceptance_estimator

    def observe_verification(self, *args: Any) -> None:
        """Let the estimator learn from the outcome of the last drafts, in some steps only."""
        if self.adaptive is None or self.adaptive.learns:
            super().observe_verification(*args)

    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
        """Inject, and draft unless the next step verifies no draft."""
        self.model.follow_target()
        if self.limits is not None:
            self.limits.refresh()
        manager = self.adaptive
        if manager is not None and manager.verify_len == 1 and self.skips_drafts:
            kwargs["num_speculative_tokens"] = 0
        short = self.short_blocks
        if manager is None or short is None or manager.draft_len != short.rows:
            return super().propose(input_batch, *args, **kwargs)
        with short.laid_out(self):
            drafts = super().propose(input_batch, *args, **kwargs)
        # Behind them stand drafts of earlier steps, which the manager leaves unverified.
        return self.draft_tokens[: len(drafts)]

    def sample_draft(
        self,
        hidden_states: Tensor,
        sample_src_positions: Tensor,
        idx_mapping: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        draft_step: Tensor,
        draft_logits: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Draft tokens int64 [T]; sets acceptance probabilities where the head makes no logits.

        Args:
            hidden_states: [T, hidden], of the rows that draft.
            sample_src_positions: int64 [T], positions before those of the drafts.
            idx_mapping: int64 [T], slots of the rows' requests; -1 for padding.
            temperature: float32 [R].
            seeds: int64 [R].
            draft_step: int32 [T], positions of the drafts in their blocks, from 0.
            draft_logits: [R, K, V], written where drafts are sampled from logits; else None.
            args: further arguments of some vLLM versions, passed on.
            kwargs: further arguments of some vLLM versions, passed on.
        """
        if self.spec.config.selector is not None:
            return self._walk(
                hidden_states, sample_src_positions, idx_mapping, temperature, seeds, draft_step
            )
        if self.adaptive is not None and draft_logits is None:
            choice = self.model.best_choice(hidden_states)
            if choice is not None:
                top = choice.logits[:, 0].contiguous()
                self._predict(top, choice.log_sum_exp, idx_mapping, draft_step)
                tokens: Tensor = self.model.drafter.token_ids(choice.tokens[:, 0])
                return tokens
        drawn: Tensor = super().sample_draft(
            hidden_states,
            sample_src_positions,
            idx_mapping,
            temperature,
            seeds,
            draft_step,
            draft_logits,
            *args,
            **kwargs,
        )
        return drawn

    def _walk(
        self,
        hidden: Tensor,
        before: Tensor,
        slots: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        draft_step: Tensor,
    ) -> Tensor:
        """Draft tokens int64 [T] along a selector's path; arguments as of ``sample_draft``."""
        drafts, rows = self.num_speculative_steps, self.num_query_per_req
        batch = len(hidden) // drafts
        anchors = self.input_buffers.input_ids[: batch * rows : rows].long()
        of_blocks, u, limits = None, None, None
        if self.selector_logits is not None and self.limits is not None:
            requests = slots[::drafts].clamp(min=0)
            of_blocks = temperature[requests]
            u = block_noise(seeds[requests] ^ SALT, before[::drafts], drafts)
            limits = self.limits.of(requests)
        found = self.model.candidates(hidden)
        path = select_drafts(self.model.drafter, found, anchors, of_blocks, u, limits)
        if self.selector_logits is not None and path.probs is not None and of_blocks is not None:
            # Verification must know that nothing is drawn beyond a request's limits.
            beyond = (path.probs == 0) & (of_blocks > 0)[:, None, None]
            scores = path.scores.masked_fill(beyond, float("-inf")).flatten(0, 1)
            self.selector_logits.write(found.tokens, scores, slots, draft_step)
        if self.adaptive is not None:
            self._predict(path.confidence.flatten(), None, slots, draft_step)
        elif self.acceptance_estimator is not None:
            self._maybe_predict_acceptance(path.scores.flatten(0, 1), slots, draft_step)
        return path.tokens.flatten()

    def _predict(
        self, top: Tensor, log_sum_exp: Tensor | None, slots: Tensor, draft_step: Tensor
    ) -> None:
        """Set acceptance probabilities; arguments as of ``predict_acceptance``."""
        estimator = self._estimator()
        predict_acceptance(
            top,
            log_sum_exp,
            slots,
            draft_step,
            estimator.slope,
            estimator.intercepts,
            estimator.features,
            estimator.predictions,
        )
