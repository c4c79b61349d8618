"""Verify passes that are cut, and draft passes that are left out."""

from __future__ import annotations

from dflash_plugin.sglang.seams.features import ADAPTIVE, ADAPTIVE_GRAPHS, ADAPTIVE_RECURRENT
from dflash_plugin.sglang.seams.rows import WORKER, members, rows

GDN = "layers.attention.linear.gdn_backend"

ROWS = (
    *rows(
        "model_executor.forward_batch_info", "patch", ADAPTIVE,
        "cuts positions on several axes to the rows of a pass",
        "ForwardBatch.compute_spec_mrope_positions",
        signature=("model_runner", "batch", "seq_positions"),
    ),
    *rows(
        "model_executor.model_runner", "subclass", ADAPTIVE,
        "replaced on the drafter's runner: skips draft passes that nothing verifies",
        "ModelRunner.forward", signature=("forward_batch", "..."),
    ),
    *rows(
        "model_executor.model_runner", "call", ADAPTIVE, "makes a back end for cut passes",
        "ModelRunner._get_attention_backend", signature=("*", "init_new_workspace"),
    ),
    *rows(
        "mem_cache.kv_index_translator", "call", ADAPTIVE, "plans the slots that a cut pass writes",
        "KVIndexTranslator.plan",
        signature=(
            "*", "req_pool_indices", "seq_lens", "seq_lens_cpu", "write_virtual", "read_extent",
        ),
        since="0.5.22",
    ),
    *rows(
        "distributed.parallel_state", "attribute", ADAPTIVE, "ranks agree on a verify length",
        *members("GroupCoordinator", "world_size", "ranks", "cpu_group"),
    ),
    *rows(
        "managers.scheduler", "attribute", ADAPTIVE, "lets prompts wait for others",
        *members("Scheduler", "min_free_slots_delayer", "waiting_queue"),
    ),
    *rows(
        "managers.min_free_slots_delayer", "call", ADAPTIVE, "lets prompts wait for others",
        "MinFreeSlotsDelayer.should_delay",
        signature=("*", "running_bs", "num_allocatable_reqs"),
    ),
    *rows(
        "managers.schedule_batch", "attribute", ADAPTIVE, "cuts a batch, or leaves it whole",
        *members("ScheduleBatch", "out_cache_loc", "return_logprob", "has_grammar"),
    ),
    *rows(
        WORKER, "attribute", ADAPTIVE, "whether the target keeps state",
        "DFlashWorkerV2._need_mamba_verify_commit",
    ),
    *rows(
        "speculative.dflash_info", "attribute", ADAPTIVE, "cuts the input to the selected rows",
        *members("DFlashVerifyInput", "draft_token", "positions"),
    ),
    *rows(
        "speculative.dflash_info", "attribute", ADAPTIVE, "tells of the rows of a shorter block",
        *members(
            "DFlashVerifyInput",
            "draft_token_num", "num_tokens_per_req", "num_tokens_for_logprob_per_req",
        ),
    ),
    *rows(
        "model_executor.forward_batch_info", "attribute", ADAPTIVE,
        "leaves the first rows of each block in a draft pass",
        *members("ForwardBatch", "input_ids", "num_token_non_padded"),
    ),
    *rows(
        "model_executor.forward_batch_info", "attribute", ADAPTIVE,
        "leaves the first rows of each block in a draft pass",
        "ForwardBatch.global_num_token_non_padded_cpu", since="0.5.20",
    ),
    *rows(
        "model_executor.forward_batch_info", "attribute", ADAPTIVE,
        "leaves the first rows of each block in a draft pass",
        "ForwardBatch.kv_loc_plan", since="0.5.22",
    ),
    *rows(
        "mem_cache.kv_loc_plan", "call", ADAPTIVE, "plans the slots of a shorter block",
        "KVLocPlan.bind", signature=("batch", "reader", "*", "cols"), since="0.5.22",
    ),
    *rows(
        "speculative.dflash_info", "attribute", ADAPTIVE, "plans the slots that a cut pass writes",
        "DFlashVerifyInput.kv_loc_plan", since="0.5.22",
    ),
    *rows(
        "mem_cache.kv_loc_plan", "attribute", ADAPTIVE, "plans the slots that a cut pass writes",
        *members("KVLocPlan", "req_pool_indices", "seq_lens", "seq_lens_cpu"), since="0.5.22",
    ),
    *rows(
        "model_executor.model_runner", "attribute", ADAPTIVE, "swaps back ends and graphs",
        "ModelRunner.init_new_workspace",
    ),
    *rows(
        "model_executor.model_runner", "attribute", ADAPTIVE,
        "plans the slots that a cut pass writes",
        "ModelRunner.kv_index_translator", since="0.5.19",
    ),
    *rows(
        "model_executor.runner.decode_cuda_graph_runner", "patch", ADAPTIVE_GRAPHS,
        "lets the runner of cut passes have the ragged verify mode",
        "ragged_verify_compact_graphs_enabled", signature=("spec_algorithm",),
    ),
    *rows(
        "model_executor.runner.decode_cuda_graph_runner", "subclass", ADAPTIVE_GRAPHS,
        "captures few numbers of rows",
        "DecodeCudaGraphRunner._build_ragged_verify_token_buckets", signature=(),
    ),
    *rows(
        "model_executor.runner.decode_cuda_graph_runner", "subclass", ADAPTIVE_GRAPHS,
        "captures draft passes of shorter blocks for many requests alone",
        "DecodeCudaGraphRunner.capture", signature=(),
    ),
    *rows(
        "model_executor.runner.decode_cuda_graph_runner", "subclass", ADAPTIVE_GRAPHS,
        "gives each request its rows while a pass is captured",
        "DecodeCudaGraphRunner._capture_ragged_verify_layout", signature=("num_tokens",),
    ),
    *rows(
        "model_executor.runner.decode_cuda_graph_runner", "subclass", ADAPTIVE_GRAPHS,
        "leaves out what our attention does not read",
        "DecodeCudaGraphRunner._stage_ragged_verify_layout",
        signature=("ragged_layout", "graph_size_key"),
    ),
    *rows(
        "model_executor.runner.decode_cuda_graph_runner", "call", ADAPTIVE_GRAPHS,
        "captures cut passes",
        "DecodeCudaGraphRunner",
        signature=("model_runner", "*", "attn_backend", "speculative_num_draft_tokens"),
    ),
    *rows(
        "model_executor.runner.decode_cuda_graph_runner", "attribute", ADAPTIVE_GRAPHS,
        "its back end knows which states a pass left", "DecodeCudaGraphRunner.attn_backend",
    ),
    *rows(
        "model_executor.runner.decode_cuda_graph_runner", "attribute", ADAPTIVE_GRAPHS,
        "captures and times passes",
        *members(
            "DecodeCudaGraphRunner", "capture_bs", "backend", "capture_num_tokens", "max_bs"
        ),
    ),
    *rows(
        "speculative.ragged_verify", "attribute", ADAPTIVE_GRAPHS, "lays out a cut pass",
        *members(
            "RaggedVerifyLayout",
            "verify_lens", "graph_num_tokens", "extend_start_loc", "qo_indptr_device",
            "total_verify_tokens", "verify_lens_cpu",
        ),
    ),
    *rows(
        "speculative.dflash_info", "attribute", ADAPTIVE_GRAPHS, "lays out a cut pass",
        "DFlashVerifyInput.ragged_verify_layout",
    ),
    *rows(
        "layers.attention.base_attn_backend", "attribute", ADAPTIVE_GRAPHS,
        "whether the back end's own attention takes such a layout",
        "AttentionBackend.supports_ragged_verify_graph",
    ),
    *rows(
        "model_executor.runner_backend.full_cuda_graph_backend", "attribute", ADAPTIVE_GRAPHS,
        "times captured passes", "FullCudaGraphBackend._graphs",
    ),
    *rows(
        "model_executor.runner_backend.breakable_cuda_graph_backend", "attribute", ADAPTIVE_GRAPHS,
        "times captured passes", "BreakableCudaGraphBackend._graphs",
    ),
    *rows(
        "model_executor.runner.shape_key", "attribute", ADAPTIVE_GRAPHS, "times captured passes",
        "ShapeKey.size",
    ),
    *rows(
        GDN, "subclass", ADAPTIVE_RECURRENT,
        "replaced on back ends: takes requests with different numbers of rows",
        "GDNAttnBackend.forward_extend",
        signature=("layer", "forward_batch", "mixed_qkv", "a", "b", "..."),
    ),
    *rows(
        GDN, "call", ADAPTIVE_RECURRENT, "the convolution of whole blocks",
        "causal_conv1d_update",
    ),
    *rows(
        "layers.attention.linear.kernels.gdn_triton", "call", ADAPTIVE_RECURRENT,
        "the delta rule of rows",
        "TritonGDNKernel.target_verify",
        signature=(
            "*", "A_log", "dt_bias", "q", "k", "v", "a", "b", "ssm_states", "cache_indices",
            "query_start_loc", "intermediate_states_buffer", "intermediate_state_indices",
            "cache_steps", "retrieve_parent_token",
        ),
    ),
    *rows(
        "mem_cache.memory_pool", "call", ADAPTIVE_RECURRENT, "a layer's states",
        "HybridReqToTokenPool.mamba2_layer_cache", signature=("layer_id",),
    ),
    *rows(
        "layers.attention.hybrid_linear_attn_backend", "attribute", ADAPTIVE_RECURRENT,
        "the recurrent layers and the others",
        *members("HybridLinearAttnBackend", "linear_attn_backend", "full_attn_backend"),
        *members("ForwardMetadata", "query_start_loc", "mamba_cache_indices"),
        "MambaAttnBackendBase.forward_metadata",
    ),
    *rows(
        GDN, "attribute", ADAPTIVE_RECURRENT, "the rows and the kernel of a pass",
        *members("GDNAttnBackend", "verify_intermediate_state_indices", "kernel_dispatcher"),
        "GDNKernelDispatcher.tree_verify_kernel",
    ),
    *rows(
        "mem_cache.memory_pool", "attribute", ADAPTIVE_RECURRENT, "a layer's states",
        "HybridReqToTokenPool.mamba_map",
    ),
)  # fmt: skip
