"""Targets of other kinds: LoRA, recurrent state, layers that SGLang does not hand on."""

from __future__ import annotations

from dflash_plugin.sglang.seams.features import (
    LAST_LAYER,
    LORA,
    OTHER_TARGETS,
    TOLD_OUTPUTS,
    VERIFY_STATE,
)
from dflash_plugin.sglang.seams.rows import members, rows

ROWS = (
    *rows(
        "models.qwen2", "call", OTHER_TARGETS, "tells the target its layers",
        "Qwen2ForCausalLM.set_eagle3_layers_to_capture", signature=("layer_ids",),
    ),
    *rows(
        "models.glm4", "attribute", OTHER_TARGETS, "tells the target its layers",
        "Glm4Model.layers_to_capture", "Glm4ForCausalLM.capture_aux_hidden_states",
    ),
    *rows(
        "models.qwen3_5", "call", TOLD_OUTPUTS, "tells the target its layers",
        "Qwen3_5ForCausalLM.set_dflash_layers_to_capture", signature=("layers_to_capture",),
    ),
    *rows(
        "layers.logits_processor", "call", LAST_LAYER, "adds the last layer to what it is given",
        "LogitsProcessor.forward",
        signature=(
            "input_ids", "hidden_states", "lm_head", "logits_metadata", "aux_hidden_states",
            "hidden_states_before_norm",
        ),
    ),
    *rows(
        "mem_cache.memory_pool", "attribute", VERIFY_STATE, "the size of a verify pass's state",
        "HybridReqToTokenPool.mamba_pool",
        *members("MambaPool", "mamba_cache", "SpeculativeState"),
    ),
    *rows(
        "lora.layers", "attribute", LORA, "borrows the target's head",
        "BaseLayerWithLoRA.base_layer",
    ),
)  # fmt: skip
