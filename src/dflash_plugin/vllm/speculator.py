"""The V2 runner's speculator: vLLM's own, around this project's drafter.

The runner's contract, staging, metadata and CUDA graphs of injection and draft are inherited;
what is replaced is the model and the layout of its block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.draft_tokens import noise_of_walks, walk
from dflash_plugin.vllm import adaptive, compat
from dflash_plugin.vllm.draft_logits import Proposals
from dflash_plugin.vllm.model import EngineDrafter
from dflash_plugin.vllm.options import required_spec

# vLLM decides on drafts by noise of the same generator, keyed by the same seeds and positions.
SALT = 0x5EED_D4AF_7000_0001


class Speculator(DFlashSpeculator):
    """Drafts a block per request on the device, without a host wait."""

    _speculator_name = "dflash-plugin"
    draft_logits: Tensor | None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.info = required_spec(vllm_config)
        self.budget: adaptive.Budget | None = None
        self.skips_drafts = compat.current().skips_drafts
        config = self.info.config
        self.sample_from_anchor = config.sample_from_anchor
        self.num_query_per_req = self.num_speculative_steps + (not config.sample_from_anchor)
        if self.speculative_config.draft_sample_method != "probabilistic":
            # The model finds the likeliest tokens without logits, which only an estimator reads.
            self.use_local_argmax_reduction = not getattr(self, "use_acceptance_estimator", False)
        self.proposals: Proposals | None = None
        if config.selector is not None and self.draft_logits is not None:
            # Ours takes the memory of vLLM's.
            shape, self.draft_logits = self.draft_logits.shape, None
            self.proposals = Proposals(shape, config.selector.top_k, device)
            self.draft_logits = self.proposals.logits

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        """The hosted drafter, bound to the target."""
        model: EngineDrafter = super().load_draft_model(target_model, target_attn_layer_names)
        model.bind(target_model)
        return model

    def set_attn(self, model_state: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Attach the paged cache.

        Raises:
            DFlashError: layers that share a cache group differ in causality.
        """
        super().set_attn(model_state, kv_cache_config, *args, **kwargs)
        self.budget = adaptive.latest()
        if self.budget is not None:
            self.budget.chances = self.acceptance_estimator.predictions
            adaptive.compile_estimator(self.acceptance_estimator, self.device)
        causal = dict(
            zip(
                self.model.get_draft_kv_cache_layer_names(),
                self.model.get_draft_attn_causal(),
                strict=True,
            )
        )
        for group in kv_cache_config.kv_cache_groups:
            kinds = {causal[name] for name in group.layer_names if name in causal}
            if len(kinds) > 1:
                raise DFlashError(
                    "the drafter has causal and non-causal layers with the same window, which "
                    "vLLM keeps in one cache group and runs alike: use the Transformers engine"
                )

    def observe_verification(self, *args: Any) -> None:
        """Let the estimator learn from what came of the last drafts, now and then."""
        if self.budget is None or self.budget.learns:
            super().observe_verification(*args)

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Inject, and draft unless the step that comes verifies nothing."""
        budget = self.budget
        if budget is not None and budget.width == 1 and self.skips_drafts:
            kwargs["num_speculative_tokens"] = 0
        return super().propose(input_batch, *args, **kwargs)

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
        """Draft tokens int64 [T]; where the head makes no logits, their chances come out of it.

        Args:
            hidden_states: [T, hidden], of the rows that draft.
            sample_src_positions: int64 [T], the places before the drafts.
            idx_mapping: int64 [T], slots of the rows' requests; -1 for padding.
            temperature: float32 [R].
            seeds: int64 [R].
            draft_step: int32 [T], places of the drafts in their blocks.
            draft_logits: takes logits where drafts are drawn from them.
            args: what versions add.
            kwargs: the same.
        """
        if self.info.config.selector is not None:
            return self._walk(
                hidden_states, sample_src_positions, idx_mapping, temperature, seeds, draft_step
            )
        if self.budget is not None and draft_logits is None:
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
        """Draft tokens int64 [T] along a selector's path; arguments as ``sample_draft``'s."""
        drafts, rows = self.num_speculative_steps, self.num_query_per_req
        batch = len(hidden) // drafts
        anchors = self.input_buffers.input_ids[: batch * rows : rows].long()
        heat, u = None, None
        if self.proposals is not None:
            requests = slots[::drafts].clamp(min=0)
            heat = temperature[requests]
            u = noise_of_walks(seeds[requests] ^ SALT, before[::drafts], drafts)
        found = self.model.candidates(hidden)
        path = walk(self.model.drafter, found, anchors, heat, u)
        if self.proposals is not None:
            scores = path.scores.flatten(0, 1)
            self.proposals.write(found.tokens, scores, slots, draft_step)
        if self.budget is not None:
            self._predict(path.confidence.flatten(), None, slots, draft_step)
        elif self.acceptance_estimator is not None:
            self._maybe_predict_acceptance(path.scores.flatten(0, 1), slots, draft_step)
        return path.tokens.flatten()

    def _predict(
        self, top: Tensor, log_sum_exp: Tensor | None, slots: Tensor, draft_step: Tensor
    ) -> None:
        """How probably drafts stand; arguments as ``predict_acceptance``'s."""
        from dflash_plugin.kernels.predict_acceptance import predict_acceptance

        estimator = self.acceptance_estimator
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
