"""The V2 runner's speculator: vLLM's own, around this project's drafter.

The runner's contract, staging, metadata and CUDA graphs of injection and draft are inherited;
what is replaced is the model and the layout of its block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from dflash_plugin.errors import DFlashError
from dflash_plugin.vllm.model import HostedDrafter, required


class Speculator(DFlashSpeculator):
    """Drafts a block per request on the device, without a host wait."""

    _speculator_name = "dflash-plugin"

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.info = required(vllm_config)
        config = self.info.config
        self.sample_from_anchor = config.sample_from_anchor
        self.num_query_per_req = self.num_speculative_steps + (not config.sample_from_anchor)
        if self.speculative_config.draft_sample_method != "probabilistic":
            # The model finds the likeliest tokens without logits, which only an estimator reads.
            self.use_local_argmax_reduction = not getattr(self, "use_acceptance_estimator", False)

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        """The hosted drafter, bound to the target."""
        model: HostedDrafter = super().load_draft_model(target_model, target_attn_layer_names)
        model.bind(target_model)
        return model

    def set_attn(self, model_state: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Attach the paged cache.

        Raises:
            DFlashError: layers that share a cache group differ in causality.
        """
        super().set_attn(model_state, kv_cache_config, *args, **kwargs)
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
