"""Every symbol of SGLang that this adapter hooks, patches, subclasses, calls or reads.

The table is for all supported versions. Hooks and patches of modules are applied from it. A server
that uses this project's drafter verifies it when it starts: the launcher its hooks, and each
scheduler process the rest, as far as the features in use need it. ``tests/contracts`` checks the
table against the source of each supported version.

Rows of kind "hook" are applied by SGLang's own ``HookRegistry``. Methods that are replaced on a
live object, and not in their module, are listed as "subclass": what holds for an override holds for
them.

Not in the table: what serves on a CPU only (``cpu``), which is for development and tests.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.engine_surface import Kind, Seam, Surface
from dflash_plugin.sglang import compat

ENGINE = "SGLang"

# Features.
ARGUMENTS = "arguments"
META_INFO = "acceptance in meta_info"
DRAFTING = "drafting"
VERIFYING = "verification"
METRICS = "metrics"
KNOWN_ANSWERS = "known answers"
GRAPHS = "CUDA graphs"
BLOCK_ATTENTION = "attention of blocks"
TRITON = "attention of blocks under the Triton back end"
FLASH_ATTENTION = "attention of blocks under the FlashAttention back end"
FLASHINFER = "attention of blocks under the FlashInfer back end"
ADAPTIVE = "adaptive verification"
ADAPTIVE_GRAPHS = "adaptive verification in CUDA graphs"
ADAPTIVE_RECURRENT = "adaptive verification of a target with recurrent layers"
LORA = "a target with LoRA"
LAST_LAYER = "reading the target's last layer"
OTHER_TARGETS = "a target that SGLang itself does not serve with DFlash"
TOLD_OUTPUTS = "a target that SGLang tells other layers than it keeps"
WEIGHTS = "new weights"
VERIFY_STATE = "state of a recurrent target"

# What the scheduler does with a request for new weights.
UPDATES = tuple(
    f"SchedulerWeightUpdaterManager.update_weights_from_{source}"
    for source in ("disk", "distributed", "tensor", "ipc")
)
SOURCES = ("FromDisk", "sFromDistributed", "sFromTensor", "sFromIPC")

# In use in every scheduler process with our worker.
ALWAYS = frozenset({DRAFTING, VERIFYING, METRICS, KNOWN_ANSWERS, GRAPHS, WEIGHTS})


def _rows(
    module: str,
    kind: Kind,
    feature: str,
    why: str,
    *symbols: str,
    signature: tuple[str, ...] | None = None,
    since: str = "",
    until: str = "",
) -> tuple[Seam, ...]:
    """Rows of the table that differ in the symbol alone."""
    return tuple(
        Seam(f"sglang.srt.{module}", symbol, kind, feature, why, signature, since, until)
        for symbol in symbols
    )


def _members(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for name in names)


_HOOKS = (
    *_rows(
        "arg_groups.speculative_hook", "hook", ARGUMENTS,
        "stages the drafter before SGLang reads its configuration",
        "handle_speculative_decoding", signature=("server_args",),
    ),
    *_rows(
        "arg_groups.speculative_hook", "hook", ARGUMENTS,
        "lets the check of the device pass on a CPU",
        "_handle_dflash", signature=("server_args",),
    ),
    *_rows(
        "speculative.spec_info", "hook", DRAFTING, "returns our worker for our drafters",
        "SpeculativeAlgorithm.create_worker", signature=("server_args",),
    ),
    *_rows(
        "managers.scheduler", "hook", KNOWN_ANSWERS,
        "checks the drafter and begins to count when everything is warm",
        "dispatch_event_loop", signature=("scheduler",),
    ),
    *_rows(
        "managers.scheduler", "hook", METRICS, "adds the drafter to /server_info",
        "Scheduler.get_internal_state", signature=("recv_req",),
    ),
    *_rows(
        "managers.scheduler_components.batch_result_processor", "hook", METRICS,
        "counts accepted drafts",
        "SchedulerBatchResultProcessor._resolve_spec_v2_tokens", signature=("result", "batch"),
    ),
    *_rows(
        "managers.tokenizer_manager", "hook", META_INFO,
        "adds the acceptance by position to meta_info",
        "TokenizerManager._calculate_spec_decoding_metrics", signature=("meta_info", "..."),
    ),
    *_rows(
        "managers.tokenizer_manager", "hook", VERIFYING, "gives each answer of a request its seed",
        "TokenizerManager._send_one_request", signature=("tokenized_obj",),
    ),
    *_rows(
        "managers.tokenizer_manager", "hook", WEIGHTS, "does not serve a drafter's path as a model",
        "TokenizerManager._update_model_path_info", signature=("model_path", "..."),
    ),
    *_rows(
        "managers.scheduler_components.weight_updater", "hook", WEIGHTS,
        "keeps the target's tensors from the drafter",
        "SchedulerWeightUpdaterManager._select_runners", signature=("selector",), since="0.5.21",
    ),
    *_rows(
        "managers.scheduler_components.weight_updater", "hook", WEIGHTS,
        "refuses new weights while requests run",
        *UPDATES, signature=("recv_req",), until="0.5.21",
    ),
    *_rows(
        "managers.scheduler_components.weight_updater", "hook", WEIGHTS,
        "loads the drafter again whose memory was released",
        "SchedulerWeightUpdaterManager.resume_memory_occupation", signature=("recv_req",),
    ),
)  # fmt: skip

_WORKER = "speculative.dflash_worker_v2"
_GDN = "layers.attention.linear.gdn_backend"
_UPDATER = "model_executor.model_runner_components.weight_updater"

_PATCHES = (
    *_rows(
        "models.registry", "patch", DRAFTING, "registers the draft model", "ModelRegistry",
    ),
    *_rows(
        _WORKER, "patch", VERIFYING, "applies our penalties to the target's logits",
        "apply_dflash_verify_logits_adjustments",
        signature=("*", "next_token_logits", "sampling_info", "draft_token_num"),
    ),
    *_rows(
        _WORKER, "patch", VERIFYING, "accepts drafts of requests that sample",
        "compute_dflash_sampling_correct_drafts_and_bonus",
        signature=("*", "candidates", "next_token_logits", "sampling_info", "..."),
    ),
    *_rows(
        _WORKER, "patch", VERIFYING, "accepts drafts of cut passes",
        "compute_dflash_correct_drafts_and_bonus",
        signature=("*", "candidates", "target_predict"),
    ),
    *_rows(
        "model_executor.runner.decode_cuda_graph_runner", "patch", ADAPTIVE_GRAPHS,
        "lets the runner of cut passes have the ragged verify mode",
        "ragged_verify_compact_graphs_enabled", signature=("spec_algorithm",),
    ),
    *_rows(
        "model_executor.forward_batch_info", "patch", ADAPTIVE,
        "cuts positions on several axes to the rows of a pass",
        "ForwardBatch.compute_spec_mrope_positions",
        signature=("model_runner", "batch", "seq_positions"),
    ),
    *_rows(
        _WORKER, "patch", VERIFYING, "samples on every device",
        "is_dflash_sampling_verify_available", signature=(),
    ),
    *_rows(
        _WORKER, "patch", VERIFYING, "compacts the input of a verify pass",
        "DFlashVerifyInput",
    ),
    *_rows(
        _WORKER, "patch", DRAFTING, "sends lengths of prompts without waiting for the GPU",
        "torch", until="0.5.23",
    ),
)  # fmt: skip

_SUBCLASSES = (
    *_rows(
        _WORKER, "subclass", DRAFTING, "our worker passes on what its version is given",
        "DFlashWorkerV2",
        signature=("server_args", "...",),
    ),
    *_rows(
        _WORKER, "subclass", DRAFTING, "a prefill, or draft, verify and inject",
        "DFlashWorkerV2.forward_batch_generation", signature=("batch", "..."),
    ),
    *_rows(
        _WORKER, "subclass", DRAFTING, "installs our attention and builds the verifier",
        "DFlashWorkerV2.init_attention_backends", signature=(),
    ),
    *_rows(
        _WORKER, "subclass", GRAPHS, "captures cut passes",
        "DFlashWorkerV2.init_cuda_graphs", signature=(),
    ),
    *_rows(
        _WORKER, "subclass", GRAPHS, "drafts at the end of the captured draft pass",
        "DFlashWorkerV2._maybe_build_draft_sampler", signature=(),
    ),
    *_rows(
        _WORKER, "subclass", DRAFTING, "drafts outside of CUDA graphs",
        "DFlashWorkerV2._greedy_sample_from_vocab_parallel_head",
        signature=("*", "hidden_states", "lm_head", "chunk_size"),
    ),
    *_rows(
        _WORKER, "subclass", DRAFTING, "turns SGLang's own KV injection off",
        "DFlashWorkerV2._init_fused_kv_helper", signature=(),
    ),
    *_rows(
        _WORKER, "subclass", DRAFTING, "injects context into the drafter's cache",
        "DFlashWorkerV2._append_target_hidden_to_draft_kv_by_loc",
        signature=(
            "*", "target_hidden", "cache_loc", "positions", "cache_loc_2d", "commit_lens", "...",
        ),
    ),
    *_rows(
        _WORKER, "subclass", VERIFYING, "accepts every batch that samples",
        "DFlashWorkerV2._validate_phase1_sampling_support", signature=("batch",),
    ),
    *_rows(
        _WORKER, "subclass", VERIFYING, "asks for logits where sampling or penalties need them",
        "DFlashWorkerV2._can_skip_verify_logits", signature=("batch", "sampling_info"),
        since="0.5.23",
    ),
    *_rows(
        _WORKER, "subclass", DRAFTING, "fills blocks with the drafter's mask token",
        "DFlashWorkerV2._resolve_mask_token_id", signature=("*", "mask_token", "..."),
    ),
    *_rows(
        _WORKER, "subclass", DRAFTING, "leaves the target's embedding as it is",
        "DFlashWorkerV2._maybe_merge_trained_mask_embedding", signature=(), since="0.5.20",
    ),
    *_rows(
        "speculative.base_spec_worker", "subclass", WEIGHTS,
        "tells which of both models got new weights",
        "BaseSpecWorker.update_weights_from_disk", "BaseSpecWorker.update_weights_from_ipc",
        signature=("recv_req",), until="0.5.21",
    ),
    *_rows(
        _UPDATER, "subclass", WEIGHTS, "tells a drafter's directory from a target's",
        "WeightUpdater.update_weights_from_disk", signature=("model_path", "..."),
    ),
    *_rows(
        _UPDATER, "subclass", WEIGHTS, "lets the server survive weights that do not fit",
        "WeightUpdater.update_weights_from_tensor", signature=("named_tensors", "load_format"),
    ),
    *_rows(
        _UPDATER, "subclass", WEIGHTS, "lets the server survive weights that do not fit",
        "WeightUpdater.update_weights_from_ipc", signature=("recv_req",),
    ),
    *_rows(
        _UPDATER, "subclass", WEIGHTS, "lets the server survive weights that do not fit",
        "WeightUpdater.update_weights_from_distributed", signature=("...",), until="0.5.21",
    ),
    *_rows(
        _UPDATER, "subclass", WEIGHTS, "lets the server survive weights that do not fit",
        "WeightUpdater.load_weights_from_distributed", signature=("named_tensors",),
        since="0.5.21",
    ),
    *_rows(
        _UPDATER, "subclass", WEIGHTS, "leaves the drafter whole",
        "WeightUpdater.begin_weight_update", signature=(), since="0.5.21",
    ),
    *_rows(
        _UPDATER, "subclass", WEIGHTS, "leaves the drafter whole",
        "WeightUpdater.end_weight_update", signature=("*", "run_post_load"), since="0.5.21",
    ),
    *_rows(
        "speculative.dflash_info", "subclass", VERIFYING, "cuts the input to the selected rows",
        "DFlashVerifyInput.prepare_for_verify", signature=("batch", "target_worker", "..."),
    ),
    *_rows(
        "managers.tp_worker", "subclass", VERIFYING,
        "replaced on the target's worker: takes the output of a cut pass",
        "TpModelWorker.forward_batch_generation", signature=("batch", "..."),
    ),
    *_rows(
        "model_executor.model_runner", "subclass", VERIFYING,
        "replaced on the target's runner: draws the first token with the request's seed",
        "ModelRunner.sample", signature=("logits_output", "forward_batch"),
    ),
    *_rows(
        "model_executor.model_runner", "subclass", ADAPTIVE,
        "replaced on the drafter's runner: skips draft passes that nothing verifies",
        "ModelRunner.forward", signature=("forward_batch", "..."),
    ),
    *_rows(
        "layers.attention.triton_backend", "subclass", TRITON,
        "replaced on back ends: attention of blocks",
        "TritonAttnBackend.forward_extend",
        signature=("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "sinks", "..."),
    ),
    *_rows(
        "layers.attention.triton_backend", "subclass", TRITON,
        "replaced on back ends: fills no metadata that nothing reads",
        "TritonAttnBackend.init_forward_metadata_out_graph",
        signature=("forward_batch", "in_capture"),
    ),
    *_rows(
        "layers.attention.flashattention_backend", "subclass", FLASH_ATTENTION,
        "replaced on back ends: attention of blocks",
        "FlashAttentionBackend.forward_extend",
        signature=(
            "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "*", "sinks", "...",
        ),
    ),
    *_rows(
        "layers.attention.flashattention_backend", "subclass", FLASH_ATTENTION,
        "replaced on back ends: fills no metadata that nothing reads",
        "FlashAttentionBackend.init_forward_metadata_out_graph",
        signature=("forward_batch", "in_capture"),
    ),
    *_rows(
        "layers.attention.flashinfer_backend", "subclass", FLASHINFER,
        "replaced on back ends: attention of blocks",
        "FlashInferAttnBackend.forward_extend",
        signature=("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "..."),
    ),
    *_rows(
        "layers.attention.flashinfer_backend", "subclass", FLASHINFER,
        "replaced on back ends: fills no metadata that nothing reads",
        "FlashInferAttnBackend.init_forward_metadata_out_graph",
        signature=("forward_batch", "in_capture"),
    ),
    *_rows(
        "model_executor.runner.decode_cuda_graph_runner", "subclass", ADAPTIVE_GRAPHS,
        "captures few numbers of rows",
        "DecodeCudaGraphRunner._build_ragged_verify_token_buckets", signature=(),
    ),
    *_rows(
        "model_executor.runner.decode_cuda_graph_runner", "subclass", ADAPTIVE_GRAPHS,
        "captures draft passes of shorter blocks for many requests alone",
        "DecodeCudaGraphRunner.capture", signature=(),
    ),
    *_rows(
        "model_executor.runner.decode_cuda_graph_runner", "subclass", ADAPTIVE_GRAPHS,
        "gives each request its rows while a pass is captured",
        "DecodeCudaGraphRunner._capture_ragged_verify_layout", signature=("num_tokens",),
    ),
    *_rows(
        "model_executor.runner.decode_cuda_graph_runner", "subclass", ADAPTIVE_GRAPHS,
        "leaves out what our attention does not read",
        "DecodeCudaGraphRunner._stage_ragged_verify_layout",
        signature=("ragged_layout", "graph_size_key"),
    ),
    *_rows(
        _GDN, "subclass", ADAPTIVE_RECURRENT,
        "replaced on back ends: takes requests with different numbers of rows",
        "GDNAttnBackend.forward_extend",
        signature=("layer", "forward_batch", "mixed_qkv", "a", "b", "..."),
    ),
    *_rows(
        "managers.scheduler_components.output_streamer", "subclass", KNOWN_ANSWERS,
        "replaced while the drafter is checked: no client gets these tokens",
        "SchedulerOutputStreamer.stream_output", signature=("reqs", "return_logprob", "..."),
    ),
    *_rows(
        "models.dflash", "subclass", DRAFTING, "the draft model", "DFlashDraftModel",
    ),
    *_rows(
        "models.dflash", "subclass", DRAFTING, "the draft model",
        "DFlashDraftModel.forward",
        signature=(
            "input_ids", "positions", "forward_batch", "input_embeds", "get_embedding",
            "pp_proxy_tensors",
        ),
    ),
    *_rows(
        "models.dflash", "subclass", DRAFTING, "the draft model",
        "DFlashDraftModel.load_weights", signature=("weights",),
    ),
    *_rows(
        "models.dflash", "subclass", DRAFTING, "the window of the draft model's layers",
        "DFlashDraftModel.get_attention_sliding_window_size", signature=(),
    ),
    *_rows(
        "layers.linear", "subclass", DRAFTING, "the drafter's sharded layers",
        *_members("QKVParallelLinear", "forward"), signature=("input_", "..."),
    ),
)  # fmt: skip

_CALLS = (
    *_rows(
        "plugins.hook_registry", "call", ARGUMENTS, "registers our hooks",
        "HookRegistry.register", signature=("target", "hook", "hook_type"),
    ),
    *_rows(
        "arg_groups.model_override_base", "call", ARGUMENTS, "reads arguments with decisions",
        "resolving_view", signature=("server_args",), since="0.5.19",
    ),
    *_rows(
        "arg_groups.overrides", "call", ARGUMENTS, "decides arguments",
        "declare_resolution", signature=("server_args", "source"), since="0.5.19",
    ),
    *_rows(
        "utils.hf_transformers.config", "call", ARGUMENTS, "reads the target's configuration",
        "get_config",
    ),
    *_rows(
        "speculative.spec_info", "call", DRAFTING, "tells DFLASH from other algorithms",
        "SpeculativeAlgorithm.is_dflash", signature=(),
    ),
    *_rows(
        "distributed.parallel_state", "call", DRAFTING, "knows the tensor-parallel ranks",
        "get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size", "get_tp_group",
        signature=(),
    ),
    *_rows(
        "distributed.communication_op", "call", DRAFTING, "gathers shards of the vocabulary",
        "tensor_model_parallel_all_gather", signature=("input_", "*", "dim"),
    ),
    *_rows(
        "layers.sampler", "call", VERIFYING, "applies custom logit processors to blocks",
        "apply_custom_logit_processor",
        signature=("logits", "sampling_batch_info", "*", "num_tokens_in_batch"),
    ),
    *_rows(
        "models.qwen2", "call", OTHER_TARGETS, "tells the target its layers",
        "Qwen2ForCausalLM.set_eagle3_layers_to_capture", signature=("layer_ids",),
    ),
    *_rows(
        "layers.logits_processor", "call", LAST_LAYER, "adds the last layer to what it is given",
        "LogitsProcessor.forward",
        signature=(
            "input_ids", "hidden_states", "lm_head", "logits_metadata", "aux_hidden_states",
            "hidden_states_before_norm",
        ),
    ),
    *_rows(
        "layers.logits_processor", "call", DRAFTING, "wraps the draft model's output",
        "LogitsProcessorOutput", signature=("*", "next_token_logits", "hidden_states"),
    ),
    *_rows(
        "layers.radix_attention", "call", DRAFTING, "the draft layers' attention",
        "RadixAttention",
        signature=(
            "*", "num_heads", "head_dim", "scaling", "num_kv_heads", "layer_id",
            "sliding_window_size", "attn_type",
        ),
    ),
    *_rows(
        "layers.linear", "call", DRAFTING, "the drafter's sharded layers",
        "QKVParallelLinear",
        signature=(
            "hidden_size", "head_size", "total_num_heads", "total_num_kv_heads",
            "*", "bias", "quant_config", "prefix",
        ),
    ),
    *_rows(
        "layers.linear", "call", DRAFTING, "the drafter's sharded layers",
        "MergedColumnParallelLinear",
        signature=("input_size", "output_sizes", "*", "bias", "quant_config", "prefix"),
    ),
    *_rows(
        "layers.linear", "call", DRAFTING, "the drafter's sharded layers",
        "RowParallelLinear", "ReplicatedLinear",
        signature=("input_size", "output_size", "*", "bias", "quant_config", "prefix"),
    ),
    *_rows(
        "layers.quantization", "call", DRAFTING, "quantised linears of a drafter",
        "get_quantization_config", signature=("quantization",),
    ),
    *_rows(
        "layers.quantization.base_config", "call", DRAFTING, "quantised linears of a drafter",
        "QuantizationConfig.from_config", signature=("config",),
    ),
    *_rows(
        "layers.quantization.base_config", "call", DRAFTING,
        "checks a drafter's quantised linears",
        "LinearMethodBase.apply", signature=("layer", "x", "bias"),
    ),
    *_rows(
        "layers.vocab_parallel_embedding", "call", DRAFTING, "the drafter's own head",
        "ParallelLMHead", signature=("num_embeddings", "embedding_dim", "*", "prefix"),
    ),
    *_rows(
        "mem_cache.memory_pool", "call", DRAFTING, "writes context to pools of other layouts",
        "MHATokenToKVPool.set_kv_buffer", "MHATokenToKVPool.set_kv_buffer_prefix_valid",
    ),
    *_rows(
        "mem_cache.memory_pool", "call", DRAFTING, "how large the drafter's pool is",
        "MHATokenToKVPool.get_kv_size_bytes", signature=(),
    ),
    *_rows(
        "mem_cache.memory_pool", "call", BLOCK_ATTENTION, "reads and writes plain pools",
        *_members("MHATokenToKVPool", "get_key_buffer", "get_value_buffer"),
        signature=("layer_id",),
    ),
    *_rows(
        "model_executor.model_runner", "call", VERIFYING, "draws the first token",
        "ModelRunner._preprocess_logits", signature=("logits_output", "sampling_info"),
    ),
    *_rows(
        "model_executor.model_runner", "call", ADAPTIVE, "makes a back end for cut passes",
        "ModelRunner._get_attention_backend", signature=("*", "init_new_workspace"),
    ),
    *_rows(
        "model_executor.runner.decode_cuda_graph_runner", "call", ADAPTIVE_GRAPHS,
        "captures cut passes",
        "DecodeCudaGraphRunner",
        signature=("model_runner", "*", "attn_backend", "speculative_num_draft_tokens"),
    ),
    *_rows(
        "models.qwen3_5", "call", TOLD_OUTPUTS, "tells the target its layers",
        "Qwen3_5ForCausalLM.set_dflash_layers_to_capture", signature=("layers_to_capture",),
    ),
    *_rows(
        _GDN, "call", ADAPTIVE_RECURRENT, "the convolution of whole blocks",
        "causal_conv1d_update",
    ),
    *_rows(
        "layers.attention.linear.kernels.gdn_triton", "call", ADAPTIVE_RECURRENT,
        "the delta rule of rows",
        "TritonGDNKernel.target_verify",
        signature=(
            "*", "A_log", "dt_bias", "q", "k", "v", "a", "b", "ssm_states", "cache_indices",
            "query_start_loc", "intermediate_states_buffer", "intermediate_state_indices",
            "cache_steps", "retrieve_parent_token",
        ),
    ),
    *_rows(
        "mem_cache.memory_pool", "call", ADAPTIVE_RECURRENT, "a layer's states",
        "HybridReqToTokenPool.mamba2_layer_cache", signature=("layer_id",),
    ),
    *_rows(
        "mem_cache.kv_index_translator", "call", ADAPTIVE, "plans the slots that a cut pass writes",
        "KVIndexTranslator.plan",
        signature=(
            "*", "req_pool_indices", "seq_lens", "seq_lens_cpu", "write_virtual", "read_extent",
        ),
        since="0.5.22",
    ),
    *_rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "Scheduler.get_next_batch_to_run", signature=("*", "running_batch", "last_batch"),
    ),
    *_rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "Scheduler.run_batch", signature=("batch",),
    ),
    *_rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "Scheduler.process_batch_result", signature=("batch", "result"),
    ),
    *_rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "Scheduler._add_request_to_queue", signature=("req",),
    ),
    *_rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "empties the cache after the check",
        "Scheduler.flush_cache", signature=(),
    ),
    *_rows(
        "utils.common", "call", KNOWN_ANSWERS, "the mode of gradients in which the scheduler runs",
        "DynamicGradMode",
    ),
    *_rows(
        "managers.schedule_batch", "call", KNOWN_ANSWERS, "makes requests of recorded prompts",
        "Req",
        signature=(
            "*", "rid", "origin_input_text", "origin_input_ids", "sampling_params", "vocab_size",
        ),
    ),
    *_rows(
        "managers.schedule_batch", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "ScheduleBatch.copy", "Req.finished", signature=(),
    ),
    *_rows(
        "sampling.sampling_params", "call", KNOWN_ANSWERS, "makes requests of recorded prompts",
        "SamplingParams", signature=("*", "max_new_tokens", "temperature", "ignore_eos"),
    ),
    *_rows(
        "sampling.sampling_params", "call", KNOWN_ANSWERS, "makes requests of recorded prompts",
        "SamplingParams.normalize", signature=("tokenizer",),
    ),
    *_rows(
        "model_executor.forward_batch_info", "call", VERIFYING, "tells kinds of passes apart",
        *_members("ForwardMode", "is_extend", "is_idle", "is_target_verify"),
    ),
)  # fmt: skip

_ATTRIBUTES = (
    *_rows(
        "plugins.hook_registry", "attribute", ARGUMENTS, "registers our hooks",
        "HookType.AROUND", "HookType.BEFORE",
    ),
    *_rows(
        "models.glm4", "attribute", OTHER_TARGETS, "tells the target its layers",
        "Glm4Model.layers_to_capture", "Glm4ForCausalLM.capture_aux_hidden_states",
    ),
    *_rows(
        "models.registry", "attribute", DRAFTING, "registers the draft model",
        "ModelRegistry.models",
    ),
    *_rows(
        "distributed.parallel_state", "attribute", ADAPTIVE, "ranks agree on a verify length",
        *_members("GroupCoordinator", "world_size", "ranks", "cpu_group"),
    ),
    *_rows(
        "managers.scheduler", "attribute", METRICS, "finds our worker and the arguments",
        *_members("Scheduler", "draft_worker", "server_args"),
    ),
    *_rows(
        "managers.scheduler", "attribute", ADAPTIVE, "lets prompts wait for others",
        *_members("Scheduler", "min_free_slots_delayer", "waiting_queue"),
    ),
    *_rows(
        "managers.min_free_slots_delayer", "call", ADAPTIVE, "lets prompts wait for others",
        "MinFreeSlotsDelayer.should_delay",
        signature=("*", "running_bs", "num_allocatable_reqs"),
    ),
    *_rows(
        "managers.scheduler", "attribute", KNOWN_ANSWERS, "runs the recorded prompts",
        *_members("Scheduler", "tokenizer", "output_streamer", "running_batch", "last_batch"),
    ),
    *_rows(
        "managers.scheduler_components.batch_result_processor", "attribute", METRICS,
        "finds our worker", "SchedulerBatchResultProcessor.draft_worker",
    ),
    *_rows(
        "managers.io_struct", "attribute", METRICS, "adds the drafter to /server_info",
        "GetInternalStateReqOutput.internal_state",
    ),
    *_rows(
        "managers.utils", "attribute", METRICS, "counts accepted drafts",
        *_members(
            "GenerationBatchResult",
            "num_correct_drafts_per_req_cpu", "speculative_num_draft_tokens",
        ),
    ),
    *_rows(
        "managers.utils", "attribute", VERIFYING, "reads what a pass gave",
        *_members(
            "GenerationBatchResult",
            "next_token_ids", "accept_lens", "logits_output", "can_run_cuda_graph",
        ),
    ),
    *_rows(
        "managers.schedule_batch", "attribute", VERIFYING, "reads a batch",
        *_members(
            "ScheduleBatch",
            "reqs", "decoding_reqs", "forward_mode", "is_extend_in_batch", "seq_lens",
            "sampling_info", "spec_info",
        ),
    ),
    *_rows(
        "managers.schedule_batch", "attribute", ADAPTIVE, "cuts a batch, or leaves it whole",
        *_members("ScheduleBatch", "out_cache_loc", "return_logprob", "has_grammar"),
    ),
    *_rows(
        "managers.schedule_batch", "attribute", VERIFYING, "penalties, seeds and stop tokens",
        *_members(
            "Req",
            "origin_input_ids", "output_ids", "sampling_params", "eos_token_ids", "tokenizer",
            "is_retracted",
        ),
    ),
    *_rows(
        "sampling.sampling_params", "attribute", VERIFYING, "penalties, seeds and stop tokens",
        *_members(
            "SamplingParams",
            "sampling_seed", "frequency_penalty", "presence_penalty", "repetition_penalty",
            "min_new_tokens", "stop_token_ids",
        ),
    ),
    *_rows(
        "sampling.sampling_batch_info", "attribute", VERIFYING, "sampling and penalties of a batch",
        *_members(
            "SamplingBatchInfo",
            "temperatures", "top_ks", "top_ps", "min_ps", "need_top_k_sampling",
            "need_top_p_sampling", "need_min_p_sampling", "is_all_greedy", "logit_bias",
            "has_custom_logit_processor", "penalizer_orchestrator", "acc_additive_penalties",
            "acc_scaling_penalties",
        ),
    ),
    *_rows(
        "sampling.penaltylib.orchestrator", "attribute", VERIFYING, "whether a batch has penalties",
        "BatchedPenalizerOrchestrator.is_required",
    ),
    *_rows(
        _WORKER, "attribute", DRAFTING, "the state of SGLang's worker",
        *_members(
            "DFlashWorkerV2",
            "target_worker", "draft_model", "draft_model_runner", "block_size", "device",
            "model_runner", "_draft_block_ids_buf", "_draft_block_tokens_buf",
            "_use_fused_kv_materialize", "_fused_kv_helper",
        ),
    ),
    *_rows(
        _WORKER, "attribute", ADAPTIVE, "whether the target keeps state",
        "DFlashWorkerV2._need_mamba_verify_commit",
    ),
    *_rows(
        "speculative.dflash_info", "attribute", ADAPTIVE, "cuts the input to the selected rows",
        *_members("DFlashVerifyInput", "draft_token", "positions"),
    ),
    *_rows(
        "speculative.dflash_info", "attribute", ADAPTIVE, "tells of the rows of a shorter block",
        *_members(
            "DFlashVerifyInput",
            "draft_token_num", "num_tokens_per_req", "num_tokens_for_logprob_per_req",
        ),
    ),
    *_rows(
        "model_executor.forward_batch_info", "attribute", ADAPTIVE,
        "leaves the first rows of each block in a draft pass",
        *_members("ForwardBatch", "input_ids", "num_token_non_padded"),
    ),
    *_rows(
        "model_executor.forward_batch_info", "attribute", ADAPTIVE,
        "leaves the first rows of each block in a draft pass",
        "ForwardBatch.global_num_token_non_padded_cpu", since="0.5.20",
    ),
    *_rows(
        "model_executor.forward_batch_info", "attribute", ADAPTIVE,
        "leaves the first rows of each block in a draft pass",
        "ForwardBatch.kv_loc_plan", since="0.5.22",
    ),
    *_rows(
        "mem_cache.kv_loc_plan", "call", ADAPTIVE, "plans the slots of a shorter block",
        "KVLocPlan.bind", signature=("batch", "reader", "*", "cols"), since="0.5.22",
    ),
    *_rows(
        "speculative.dflash_info", "attribute", ADAPTIVE, "plans the slots that a cut pass writes",
        "DFlashVerifyInput.kv_loc_plan", since="0.5.22",
    ),
    *_rows(
        "mem_cache.kv_loc_plan", "attribute", ADAPTIVE, "plans the slots that a cut pass writes",
        *_members("KVLocPlan", "req_pool_indices", "seq_lens", "seq_lens_cpu"), since="0.5.22",
    ),
    *_rows(
        "managers.tp_worker", "attribute", DRAFTING, "finds the target's model",
        "TpModelWorker.model_runner",
    ),
    *_rows(
        "model_executor.model_runner", "attribute", DRAFTING, "the models and their pools",
        *_members(
            "ModelRunner",
            "model", "model_config", "dtype", "attn_backend", "token_to_kv_pool",
            "req_to_token_pool", "server_args", "device",
        ),
    ),
    *_rows(
        "model_executor.model_runner", "attribute", WEIGHTS, "stands in front of its loaders",
        "ModelRunner.weight_updater",
    ),
    *_rows(
        _UPDATER, "attribute", WEIGHTS, "keeps the path of what is loaded",
        "WeightUpdater.model_config",
    ),
    *_rows(
        "configs.model_config", "attribute", WEIGHTS, "keeps the path of what is loaded",
        "ModelConfig.model_path",
    ),
    *_rows(
        "managers.scheduler_components.weight_updater", "attribute", WEIGHTS, "finds our worker",
        "SchedulerWeightUpdaterManager.draft_worker",
    ),
    *_rows(
        "managers.io_struct", "attribute", WEIGHTS, "which model, and which memory",
        "UpdateWeightFromDiskReqInput.model_path", "ResumeMemoryOccupationReqInput.tags",
    ),
    *_rows(
        "managers.io_struct", "attribute", WEIGHTS, "whether new weights empty the cache",
        *(f"UpdateWeight{source}ReqInput.flush_cache" for source in SOURCES), until="0.5.21",
    ),
    *_rows(
        "managers.io_struct", "call", WEIGHTS, "refuses new weights while requests run",
        *(f"UpdateWeight{source}ReqOutput" for source in SOURCES), until="0.5.21",
    ),
    *_rows(
        "managers.scheduler_components.weight_updater", "attribute", WEIGHTS,
        "whether requests run", "SchedulerWeightUpdaterManager.is_fully_idle", until="0.5.21",
    ),
    *_rows(
        "model_executor.model_runner", "attribute", GRAPHS, "captures injection; tells of graphs",
        *_members("ModelRunner", "capture_tail_hooks", "decode_cuda_graph_runner", "eager_runner"),
    ),
    *_rows(
        "model_executor.model_runner", "attribute", ADAPTIVE, "swaps back ends and graphs",
        "ModelRunner.init_new_workspace",
    ),
    *_rows(
        "model_executor.model_runner", "attribute", ADAPTIVE,
        "plans the slots that a cut pass writes",
        "ModelRunner.kv_index_translator", since="0.5.19",
    ),
    *_rows(
        "configs.model_config", "attribute", DRAFTING, "the size of the vocabulary",
        "ModelConfig.vocab_size",
    ),
    *_rows(
        "configs.model_config", "attribute", KNOWN_ANSWERS, "leaves out prompts that are too long",
        "ModelConfig.context_len",
    ),
    *_rows(
        "mem_cache.memory_pool", "attribute", DRAFTING, "the largest batch",
        *_members("ReqToTokenPool", "size"),
    ),
    *_rows(
        "model_executor.runner.decode_cuda_graph_runner", "attribute", ADAPTIVE_GRAPHS,
        "its back end knows which states a pass left", "DecodeCudaGraphRunner.attn_backend",
    ),
    *_rows(
        "layers.attention.hybrid_linear_attn_backend", "attribute", ADAPTIVE_RECURRENT,
        "the recurrent layers and the others",
        *_members("HybridLinearAttnBackend", "linear_attn_backend", "full_attn_backend"),
        *_members("ForwardMetadata", "query_start_loc", "mamba_cache_indices"),
        "MambaAttnBackendBase.forward_metadata",
    ),
    *_rows(
        _GDN, "attribute", ADAPTIVE_RECURRENT, "the rows and the kernel of a pass",
        *_members("GDNAttnBackend", "verify_intermediate_state_indices", "kernel_dispatcher"),
        "GDNKernelDispatcher.tree_verify_kernel",
    ),
    *_rows(
        "mem_cache.memory_pool", "attribute", ADAPTIVE_RECURRENT, "a layer's states",
        "HybridReqToTokenPool.mamba_map",
    ),
    *_rows(
        "mem_cache.memory_pool", "attribute", VERIFY_STATE, "the size of a verify pass's state",
        "HybridReqToTokenPool.mamba_pool",
        *_members("MambaPool", "mamba_cache", "SpeculativeState"),
    ),
    *_rows(
        "mem_cache.memory_pool", "attribute", DRAFTING, "whether a pool is plain",
        *_members(
            "MHATokenToKVPool",
            "k_buffer", "v_buffer", "dtype", "store_dtype", "is_quantized_kv_cache", "use_hnd",
        ),
    ),
    *_rows(
        "model_executor.forward_batch_info", "attribute", VERIFYING, "reads a pass",
        *_members(
            "ForwardBatch",
            "forward_mode", "positions", "seq_lens", "req_pool_indices", "out_cache_loc",
            "sampling_info", "return_logprob", "input_embeds",
        ),
    ),
    *_rows(
        "model_executor.forward_batch_info", "attribute", BLOCK_ATTENTION,
        "leaves passes to SGLang that name a tensor for the output",
        "ForwardBatch._attn_output",
    ),
    *_rows(
        "layers.logits_processor", "attribute", VERIFYING, "takes and injects the output",
        *_members("LogitsProcessorOutput", "next_token_logits", "hidden_states"),
    ),
    *_rows(
        "model_executor.runner.decode_cuda_graph_runner", "attribute", ADAPTIVE_GRAPHS,
        "captures and times passes",
        *_members(
            "DecodeCudaGraphRunner", "capture_bs", "backend", "capture_num_tokens", "max_bs"
        ),
    ),
    *_rows(
        "speculative.ragged_verify", "attribute", ADAPTIVE_GRAPHS, "lays out a cut pass",
        *_members(
            "RaggedVerifyLayout",
            "verify_lens", "graph_num_tokens", "extend_start_loc", "qo_indptr_device",
            "total_verify_tokens", "verify_lens_cpu",
        ),
    ),
    *_rows(
        "speculative.dflash_info", "attribute", ADAPTIVE_GRAPHS, "lays out a cut pass",
        "DFlashVerifyInput.ragged_verify_layout",
    ),
    *_rows(
        "layers.attention.base_attn_backend", "attribute", ADAPTIVE_GRAPHS,
        "whether the back end's own attention takes such a layout",
        "AttentionBackend.supports_ragged_verify_graph",
    ),
    *_rows(
        _WORKER, "attribute", VERIFYING, "accepts drafts of cut passes",
        "DFlashWorkerV2._use_triton_accept_bonus",
    ),
    *_rows(
        _WORKER, "attribute", VERIFYING, "gathers the logits of cut passes",
        "DFlashWorkerV2._target_logits_processor", since="0.5.23",
    ),
    *_rows(
        "layers.logits_processor", "call", VERIFYING, "gathers the logits of cut passes",
        *_members("LogitsProcessor", "is_deferred_shard", "finish_deferred_gather"),
        signature=("logits",), since="0.5.23",
    ),
    *_rows(
        "sampling.sampling_batch_info", "attribute", VERIFYING, "verifies such batches whole",
        "SamplingBatchInfo.sampling_mask_batch_indices", since="0.5.20",
    ),
    *_rows(
        "model_executor.runner_backend.full_cuda_graph_backend", "attribute", ADAPTIVE_GRAPHS,
        "times captured passes", "FullCudaGraphBackend._graphs",
    ),
    *_rows(
        "model_executor.runner_backend.breakable_cuda_graph_backend", "attribute", ADAPTIVE_GRAPHS,
        "times captured passes", "BreakableCudaGraphBackend._graphs",
    ),
    *_rows(
        "model_executor.runner.shape_key", "attribute", ADAPTIVE_GRAPHS, "times captured passes",
        "ShapeKey.size",
    ),
    *_rows(
        "layers.attention.flashattention_backend", "attribute", FLASH_ATTENTION,
        "whether its attention is plain, and the rows it takes",
        *_members(
            "FlashAttentionBackend",
            "fa_impl_ver", "use_mla", "has_local_attention", "is_prefill_aware_swa",
            "is_encoder_decoder", "attn_cp_size", "speculative_num_draft_tokens",
        ),
    ),
    *_rows(
        "layers.attention.flashattention_backend", "attribute", FLASH_ATTENTION,
        "whether slots are translated",
        "FlashAttentionBackend.kv_index_translator", since="0.5.19",
    ),
    *_rows(
        "layers.attention.flashinfer_backend", "attribute", FLASHINFER,
        "whether its attention is plain",
        *_members("FlashInferAttnBackend", "enable_mis", "is_dllm_model"),
    ),
    *_rows(
        "layers.attention.flashinfer_backend", "attribute", FLASHINFER,
        "whether slots are translated",
        "FlashInferAttnBackend.kv_index_translator", since="0.5.19",
    ),
    *_rows(
        "layers.attention.triton_backend", "attribute", TRITON, "whether slots are translated",
        "TritonAttnBackend._translate_kv_loc", until="0.5.19",
    ),
    *_rows(
        "layers.attention.triton_backend", "attribute", TRITON, "whether slots are translated",
        "TritonAttnBackend.kv_index_translator", since="0.5.19",
    ),
    *_rows(
        "mem_cache.kv_index_translator", "attribute", BLOCK_ATTENTION,
        "whether slots are translated",
        "KVIndexTranslator.is_translating", since="0.5.19",
    ),
    *_rows(
        "model_executor.model_runner", "attribute", BLOCK_ATTENTION, "target or drafter",
        "ModelRunner.is_draft_worker",
    ),
    *_rows(
        "model_executor.forward_batch_info", "attribute", BLOCK_ATTENTION, "requests of a pass",
        "ForwardBatch.batch_size",
    ),
    *_rows(
        "speculative.dflash_info", "attribute", BLOCK_ATTENTION, "leaves masks to SGLang",
        "DFlashVerifyInput.custom_mask",
    ),
    *_rows(
        "layers.radix_attention", "attribute", BLOCK_ATTENTION,
        "whether a layer's attention is plain",
        *_members(
            "RadixAttention",
            "tp_q_head_num", "tp_k_head_num", "qk_head_dim", "v_head_dim", "sliding_window_size",
            "logit_cap", "xai_temperature_len", "is_cross_attention", "attn_type", "scaling",
            "layer_id",
        ),
    ),
    *_rows(
        "layers.radix_attention", "attribute", DRAFTING, "writes context through the pool",
        *_members("RadixAttention", "k_scale", "v_scale"),
    ),
    *_rows(
        "layers.radix_attention", "attribute", DRAFTING, "causal layers or not",
        *_members("AttentionType", "DECODER", "ENCODER_ONLY"),
    ),
    *_rows(
        "layers.quantization.unquant", "attribute", DRAFTING, "tells plain weights apart",
        "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod",
    ),
    *_rows(
        "layers.linear", "attribute", DRAFTING, "the drafter's sharded layers",
        *_members("QKVParallelLinear", "num_heads", "head_size", "quant_method"),
    ),
    *_rows(
        "layers.vocab_parallel_embedding", "attribute", DRAFTING, "borrows the target's head",
        *_members("VocabParallelEmbedding", "shard_indices", "quant_method"),
        "VocabParallelEmbeddingShardIndices.num_org_elements",
    ),
    *_rows(
        "lora.layers", "attribute", LORA, "borrows the target's head",
        "BaseLayerWithLoRA.base_layer",
    ),
)  # fmt: skip

SEAMS: tuple[Seam, ...] = (*_HOOKS, *_PATCHES, *_SUBCLASSES, *_CALLS, *_ATTRIBUTES)


def surface() -> Surface:
    """The part of the installed SGLang that this adapter depends on."""
    return _surface(compat.installed())


@cache
def _surface(version: str) -> Surface:
    return Surface(ENGINE, version, SEAMS)


def hooks(features: Collection[str] | None = None) -> list[Seam]:
    """The rows of the installed version that SGLang's ``HookRegistry`` applies.

    Args:
        features: those whose hooks are meant, or None for all.
    """
    return [
        seam
        for seam in surface().current()
        if seam.kind == "hook" and (features is None or seam.feature in features)
    ]


def verify_hooks(features: Collection[str] | None = None) -> None:
    """Check that SGLang applied our hooks; SGLang only logs one that it cannot apply.

    Args:
        features: those whose hooks are checked, or None for all.

    Raises:
        DFlashError: a hook was not applied, or the signature of its function changed.
    """
    rows = hooks(features)
    missing = [seam.name for seam in rows if not _is_wrapped(seam.name)]
    if missing:
        raise DFlashError(
            f"SGLang {compat.installed()} did not take the hooks on {', '.join(missing)}: its log "
            "above says why; install a supported version as it was published, or set "
            "DFLASH_PLUGIN=off"
        )
    for seam in rows:
        surface().record(seam.module, seam.symbol)
    _part(seam._replace(kind="subclass") for seam in rows).verify({seam.feature for seam in rows})


def verify_features(features: Collection[str]) -> None:
    """Check the functions, classes and patches that features in use in this process need.

    Raises:
        DFlashError: names what is missing, has changed or was not patched.
    """
    verify_hooks(features)
    surface().verify(features)


def verify_objects(features: Collection[str], *objects: object) -> None:
    """Check the attributes of SGLang's objects that features in use in this process need.

    Raises:
        DFlashError: names what is missing.
    """
    found = _part(seam for seam in SEAMS if seam.feature in features)
    for value in objects:
        found.verify_object(value)


def is_instance(value: object, *names: str) -> bool:
    """Whether an object is of one of SGLang's classes, by name, without importing them."""
    return any(cls.__name__ in names for cls in type(value).__mro__)


def _is_wrapped(name: str) -> bool:
    try:
        return hasattr(pkgutil.resolve_name(name), "__wrapped__")
    except (ImportError, AttributeError):
        return False


def _part(seams: Iterable[Seam]) -> Surface:
    return Surface(ENGINE, compat.installed(), seams)


def without_lora(module: Any) -> Any:
    """A target's layer without the wrapper that LoRA puts around it."""
    return getattr(module, "base_layer", module)


def head_of(model: Any) -> Any:
    """A target model's output head, or None where it has none of that name."""
    return getattr(model, "lm_head", None)


def is_dense(head: Any) -> bool:
    """Whether a head's weight is a matrix of floating-point numbers."""
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod

    method = getattr(head, "quant_method", None)
    if method is not None and not isinstance(method, UnquantizedEmbeddingMethod):
        return False
    return getattr(head, "weight", None) is not None


def max_positions(config: Any) -> int:
    """Positions that a target's configuration names; 0 where it names none."""
    return int(getattr(config, "max_position_embeddings", 0) or 0)


def model_type(config: Any) -> str:
    """The name of a target's architecture in its configuration; empty where it has none."""
    return str(getattr(config, "model_type", None) or "")


def final_norm(model: Any) -> Any:
    """The norm behind a target model's last layer, or None where it has none of that name."""
    language = getattr(model, "language_model", model)
    return getattr(getattr(language, "model", language), "norm", None)


def method_of(model: Any, name: str) -> Any:
    """A method that only some target models have, or None."""
    return getattr(model, name, None)


def layer_stack(model: Any) -> Any:
    """The part of a target model that keeps the inputs of layers, or None."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "layers_to_capture") else None


def can_return_layers(model: Any) -> bool:
    """Whether a target model hands on the inputs of layers once it is told to."""
    return hasattr(model, "capture_aux_hidden_states")
