"""The draft model, its layers and its CUDA graphs."""

from __future__ import annotations

from dflash_plugin.sglang.seams.features import DRAFTING, GRAPHS
from dflash_plugin.sglang.seams.rows import WORKER, members, rows

ROWS = (
    *rows(
        "speculative.spec_info", "hook", DRAFTING, "returns our worker for our drafters",
        "SpeculativeAlgorithm.create_worker", signature=("server_args",),
    ),
    *rows(
        "models.registry", "patch", DRAFTING, "registers the draft model", "ModelRegistry",
    ),
    *rows(
        WORKER, "patch", DRAFTING, "sends lengths of prompts without waiting for the GPU",
        "torch", until="0.5.23",
    ),
    *rows(
        WORKER, "subclass", DRAFTING, "our worker passes on what its version is given",
        "DFlashWorkerV2",
        signature=("server_args", "...",),
    ),
    *rows(
        WORKER, "subclass", DRAFTING, "a prefill, or draft, verify and inject",
        "DFlashWorkerV2.forward_batch_generation", signature=("batch", "..."),
    ),
    *rows(
        WORKER, "subclass", DRAFTING, "installs our attention and builds the verifier",
        "DFlashWorkerV2.init_attention_backends", signature=(),
    ),
    *rows(
        WORKER, "subclass", DRAFTING, "drafts outside of CUDA graphs",
        "DFlashWorkerV2._greedy_sample_from_vocab_parallel_head",
        signature=("*", "hidden_states", "lm_head", "chunk_size"),
    ),
    *rows(
        WORKER, "subclass", DRAFTING, "turns SGLang's own KV injection off",
        "DFlashWorkerV2._init_fused_kv_helper", signature=(),
    ),
    *rows(
        WORKER, "subclass", DRAFTING, "injects context into the drafter's cache",
        "DFlashWorkerV2._append_target_hidden_to_draft_kv_by_loc",
        signature=(
            "*", "target_hidden", "cache_loc", "positions", "cache_loc_2d", "commit_lens", "...",
        ),
    ),
    *rows(
        WORKER, "subclass", DRAFTING, "fills blocks with the drafter's mask token",
        "DFlashWorkerV2._resolve_mask_token_id", signature=("*", "mask_token", "..."),
    ),
    *rows(
        WORKER, "subclass", DRAFTING, "leaves the target's embedding as it is",
        "DFlashWorkerV2._maybe_merge_trained_mask_embedding", signature=(), since="0.5.20",
    ),
    *rows(
        "models.dflash", "subclass", DRAFTING, "the draft model", "DFlashDraftModel",
    ),
    *rows(
        "models.dflash", "subclass", DRAFTING, "the draft model",
        "DFlashDraftModel.forward",
        signature=(
            "input_ids", "positions", "forward_batch", "input_embeds", "get_embedding",
            "pp_proxy_tensors",
        ),
    ),
    *rows(
        "models.dflash", "subclass", DRAFTING, "the draft model",
        "DFlashDraftModel.load_weights", signature=("weights",),
    ),
    *rows(
        "models.dflash", "subclass", DRAFTING, "the window of the draft model's layers",
        "DFlashDraftModel.get_attention_sliding_window_size", signature=(),
    ),
    *rows(
        "layers.linear", "subclass", DRAFTING, "the drafter's sharded layers",
        *members("QKVParallelLinear", "forward"), signature=("input_", "..."),
    ),
    *rows(
        "speculative.spec_info", "call", DRAFTING, "tells DFLASH from other algorithms",
        "SpeculativeAlgorithm.is_dflash", signature=(),
    ),
    *rows(
        "distributed.parallel_state", "call", DRAFTING, "knows the tensor-parallel ranks",
        "get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size", "get_tp_group",
        signature=(),
    ),
    *rows(
        "distributed.communication_op", "call", DRAFTING, "gathers shards of the vocabulary",
        "tensor_model_parallel_all_gather", signature=("input_", "*", "dim"),
    ),
    *rows(
        "layers.logits_processor", "call", DRAFTING, "wraps the draft model's output",
        "LogitsProcessorOutput", signature=("*", "next_token_logits", "hidden_states"),
    ),
    *rows(
        "layers.radix_attention", "call", DRAFTING, "the draft layers' attention",
        "RadixAttention",
        signature=(
            "*", "num_heads", "head_dim", "scaling", "num_kv_heads", "layer_id",
            "sliding_window_size", "attn_type",
        ),
    ),
    *rows(
        "layers.linear", "call", DRAFTING, "the drafter's sharded layers",
        "QKVParallelLinear",
        signature=(
            "hidden_size", "head_size", "total_num_heads", "total_num_kv_heads",
            "*", "bias", "quant_config", "prefix",
        ),
    ),
    *rows(
        "layers.linear", "call", DRAFTING, "the drafter's sharded layers",
        "MergedColumnParallelLinear",
        signature=("input_size", "output_sizes", "*", "bias", "quant_config", "prefix"),
    ),
    *rows(
        "layers.linear", "call", DRAFTING, "the drafter's sharded layers",
        "RowParallelLinear", "ReplicatedLinear",
        signature=("input_size", "output_size", "*", "bias", "quant_config", "prefix"),
    ),
    *rows(
        "layers.quantization", "call", DRAFTING, "quantised linears of a drafter",
        "get_quantization_config", signature=("quantization",),
    ),
    *rows(
        "layers.quantization.base_config", "call", DRAFTING, "quantised linears of a drafter",
        "QuantizationConfig.from_config", signature=("config",),
    ),
    *rows(
        "layers.quantization.base_config", "call", DRAFTING,
        "checks a drafter's quantised linears",
        "LinearMethodBase.apply", signature=("layer", "x", "bias"),
    ),
    *rows(
        "layers.vocab_parallel_embedding", "call", DRAFTING, "the drafter's own head",
        "ParallelLMHead", signature=("num_embeddings", "embedding_dim", "*", "prefix"),
    ),
    *rows(
        "mem_cache.memory_pool", "call", DRAFTING, "writes context to pools of other layouts",
        "MHATokenToKVPool.set_kv_buffer", "MHATokenToKVPool.set_kv_buffer_prefix_valid",
    ),
    *rows(
        "mem_cache.memory_pool", "call", DRAFTING, "how large the drafter's pool is",
        "MHATokenToKVPool.get_kv_size_bytes", signature=(),
    ),
    *rows(
        "models.registry", "attribute", DRAFTING, "registers the draft model",
        "ModelRegistry.models",
    ),
    *rows(
        WORKER, "attribute", DRAFTING, "the state of SGLang's worker",
        *members(
            "DFlashWorkerV2",
            "target_worker", "draft_model", "draft_model_runner", "block_size", "device",
            "model_runner", "_draft_block_ids_buf", "_draft_block_tokens_buf",
            "_use_fused_kv_materialize", "_fused_kv_helper",
        ),
    ),
    *rows(
        "managers.tp_worker", "attribute", DRAFTING, "finds the target's model",
        "TpModelWorker.model_runner",
    ),
    *rows(
        "model_executor.model_runner", "attribute", DRAFTING, "the models and their pools",
        *members(
            "ModelRunner",
            "model", "model_config", "dtype", "attn_backend", "token_to_kv_pool",
            "req_to_token_pool", "server_args", "device",
        ),
    ),
    *rows(
        "configs.model_config", "attribute", DRAFTING, "the size of the vocabulary",
        "ModelConfig.vocab_size",
    ),
    *rows(
        "mem_cache.memory_pool", "attribute", DRAFTING, "the largest batch",
        *members("ReqToTokenPool", "size"),
    ),
    *rows(
        "mem_cache.memory_pool", "attribute", DRAFTING, "whether a pool is plain",
        *members(
            "MHATokenToKVPool",
            "k_buffer", "v_buffer", "dtype", "store_dtype", "is_quantized_kv_cache", "use_hnd",
        ),
    ),
    *rows(
        "layers.radix_attention", "attribute", DRAFTING, "writes context through the pool",
        *members("RadixAttention", "k_scale", "v_scale"),
    ),
    *rows(
        "layers.radix_attention", "attribute", DRAFTING, "causal layers or not",
        *members("AttentionType", "DECODER", "ENCODER_ONLY"),
    ),
    *rows(
        "layers.quantization.unquant", "attribute", DRAFTING, "tells plain weights apart",
        "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod",
    ),
    *rows(
        "layers.linear", "attribute", DRAFTING, "the drafter's sharded layers",
        *members("QKVParallelLinear", "num_heads", "head_size", "quant_method"),
    ),
    *rows(
        "layers.vocab_parallel_embedding", "attribute", DRAFTING, "borrows the target's head",
        *members("VocabParallelEmbedding", "shard_indices", "quant_method"),
        "VocabParallelEmbeddingShardIndices.num_org_elements",
    ),
    *rows(
        WORKER, "subclass", GRAPHS, "captures cut passes",
        "DFlashWorkerV2.init_cuda_graphs", signature=(),
    ),
    *rows(
        WORKER, "subclass", GRAPHS, "drafts at the end of the captured draft pass",
        "DFlashWorkerV2._maybe_build_draft_sampler", signature=(),
    ),
    *rows(
        "model_executor.model_runner", "attribute", GRAPHS, "captures injection; tells of graphs",
        *members("ModelRunner", "capture_tail_hooks", "decode_cuda_graph_runner", "eager_runner"),
    ),
)  # fmt: skip
