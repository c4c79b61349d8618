"""Attention of blocks by back end."""

from __future__ import annotations

from dflash_plugin.sglang.seams.features import BLOCK_ATTENTION, FLASH_ATTENTION, FLASHINFER, TRITON
from dflash_plugin.sglang.seams.rows import members, rows

ROWS = (
    *rows(
        "mem_cache.memory_pool", "call", BLOCK_ATTENTION, "reads and writes plain pools",
        *members("MHATokenToKVPool", "get_key_buffer", "get_value_buffer"),
        signature=("layer_id",),
    ),
    *rows(
        "model_executor.forward_batch_info", "attribute", BLOCK_ATTENTION,
        "leaves passes to SGLang that name a tensor for the output",
        "ForwardBatch._attn_output",
    ),
    *rows(
        "mem_cache.kv_index_translator", "attribute", BLOCK_ATTENTION,
        "whether slots are translated",
        "KVIndexTranslator.is_translating", since="0.5.19",
    ),
    *rows(
        "model_executor.model_runner", "attribute", BLOCK_ATTENTION, "target or drafter",
        "ModelRunner.is_draft_worker",
    ),
    *rows(
        "model_executor.forward_batch_info", "attribute", BLOCK_ATTENTION, "requests of a pass",
        "ForwardBatch.batch_size",
    ),
    *rows(
        "speculative.dflash_info", "attribute", BLOCK_ATTENTION, "leaves masks to SGLang",
        "DFlashVerifyInput.custom_mask",
    ),
    *rows(
        "layers.radix_attention", "attribute", BLOCK_ATTENTION,
        "whether a layer's attention is plain",
        *members(
            "RadixAttention",
            "tp_q_head_num", "tp_k_head_num", "qk_head_dim", "v_head_dim", "sliding_window_size",
            "logit_cap", "xai_temperature_len", "is_cross_attention", "attn_type", "scaling",
            "layer_id",
        ),
    ),
    *rows(
        "layers.attention.triton_backend", "subclass", TRITON,
        "replaced on back ends: attention of blocks",
        "TritonAttnBackend.forward_extend",
        signature=("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "sinks", "..."),
    ),
    *rows(
        "layers.attention.triton_backend", "subclass", TRITON,
        "replaced on back ends: fills no metadata that nothing reads",
        "TritonAttnBackend.init_forward_metadata_out_graph",
        signature=("forward_batch", "in_capture"),
    ),
    *rows(
        "layers.attention.triton_backend", "attribute", TRITON, "whether slots are translated",
        "TritonAttnBackend._translate_kv_loc", until="0.5.19",
    ),
    *rows(
        "layers.attention.triton_backend", "attribute", TRITON, "whether slots are translated",
        "TritonAttnBackend.kv_index_translator", since="0.5.19",
    ),
    *rows(
        "layers.attention.flashattention_backend", "subclass", FLASH_ATTENTION,
        "replaced on back ends: attention of blocks",
        "FlashAttentionBackend.forward_extend",
        signature=(
            "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "*", "sinks", "...",
        ),
    ),
    *rows(
        "layers.attention.flashattention_backend", "subclass", FLASH_ATTENTION,
        "replaced on back ends: fills no metadata that nothing reads",
        "FlashAttentionBackend.init_forward_metadata_out_graph",
        signature=("forward_batch", "in_capture"),
    ),
    *rows(
        "layers.attention.flashattention_backend", "attribute", FLASH_ATTENTION,
        "whether its attention is plain, and the rows it takes",
        *members(
            "FlashAttentionBackend",
            "fa_impl_ver", "use_mla", "has_local_attention", "is_prefill_aware_swa",
            "is_encoder_decoder", "attn_cp_size", "speculative_num_draft_tokens",
        ),
    ),
    *rows(
        "layers.attention.flashattention_backend", "attribute", FLASH_ATTENTION,
        "whether slots are translated",
        "FlashAttentionBackend.kv_index_translator", since="0.5.19",
    ),
    *rows(
        "layers.attention.flashinfer_backend", "subclass", FLASHINFER,
        "replaced on back ends: attention of blocks",
        "FlashInferAttnBackend.forward_extend",
        signature=("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "..."),
    ),
    *rows(
        "layers.attention.flashinfer_backend", "subclass", FLASHINFER,
        "replaced on back ends: fills no metadata that nothing reads",
        "FlashInferAttnBackend.init_forward_metadata_out_graph",
        signature=("forward_batch", "in_capture"),
    ),
    *rows(
        "layers.attention.flashinfer_backend", "attribute", FLASHINFER,
        "whether its attention is plain",
        *members("FlashInferAttnBackend", "enable_mis", "is_dllm_model"),
    ),
    *rows(
        "layers.attention.flashinfer_backend", "attribute", FLASHINFER,
        "whether slots are translated",
        "FlashInferAttnBackend.kv_index_translator", since="0.5.19",
    ),
)  # fmt: skip
