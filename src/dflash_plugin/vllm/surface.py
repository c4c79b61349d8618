"""Every vLLM symbol that this adapter patches, subclasses, calls or reads.

``verify_frontend`` and ``verify_worker`` check the table at start, each in its process. For a new
vLLM release, run ``tests/contracts`` against its wheel and mend the rows that it names.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.engine_surface import Kind, Seam, Surface
from dflash_plugin.vllm import compat

# Features: what reads the flags; what every worker needs; the V1 and V2 model runners; a CPU
# platform, and V1 on it; adaptive verification; metrics; groups of the paged cache.
ARGUMENTS, SERVE, V1, V2 = "arguments", "serve", "v1 runner", "v2 runner"
CPU, V1_ON_CPU = "cpu", "v1 runner on a cpu"
ADAPTIVE, METRICS = "adaptive", "metrics"
# Prompts that wait for others, in the process that schedules, which may be a worker's too.
WAITING = "waiting prompts"
CACHE_GROUPS = "cache groups"
# Not checked at start: without it vLLM compares paths, and says so where they differ.
NIXL = "transfer over nixl"

ARG_UTILS = "vllm.engine.arg_utils"
REGISTRY = "vllm.model_executor.models.registry"
LOADERS = "vllm.model_executor.model_loader"
SPECULATOR = "vllm.v1.worker.gpu.spec_decode.dflash.speculator"
PROPOSER = "vllm.v1.spec_decode.dflash"
RUNNER = "vllm.v1.worker.gpu.model_runner"
LORA = "vllm.v1.worker.gpu.lora_utils"
GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
MANAGER = "vllm.v1.worker.gpu.spec_decode.adaptive_verification"
WORKER = "vllm.v1.worker.gpu_worker"
CPU_WORKER = "vllm.v1.worker.cpu_worker"
TRANSFER = "vllm.distributed.weight_transfer.base"
SPEC_METRICS = "vllm.v1.spec_decode.metrics"
ENGINE_CORE = "vllm.v1.engine.core"
CORE_CLIENT = "vllm.v1.engine.core_client"
SCHEDULER = "vllm.v1.core.sched.scheduler"
LOGGERS = "vllm.v1.metrics.loggers"
CPU_KERNELS = "vllm.utils.cpu_triton_utils"
REJECTION = "vllm.v1.sample.rejection_sampler"
MODEL = "vllm.model_executor.models.qwen3_dflash"
LINEAR = "vllm.model_executor.layers.linear"
QUANTIZATION = "vllm.model_executor.layers.quantization"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
ATTENTION = "vllm.model_executor.layers.attention.attention"
METADATA = "vllm.v1.attention.backend"
ESTIMATOR = "vllm.v1.worker.gpu.spec_decode.acceptance_estimator"
OUTPUT = "vllm.v1.core.sched.output"
CACHE = "vllm.v1.kv_cache_interface"
CACHE_UTILS = "vllm.v1.core.kv_cache_utils"
CACHE_PLANNING = "vllm.v1.core.kv_cache_planning"
NIXL_METADATA = "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata"


def _seams(
    module: str, feature: str, kind: Kind, why: str, *symbols: str, since: str = "", until: str = ""
) -> Iterator[Seam]:
    """Rows that differ in their symbols alone.

    Args:
        module, feature, kind, why, since, until: as in ``Seam``.
        symbols: "name", or "name(parameter, parameter)" with the signature.
    """
    for symbol in symbols:
        name, has_signature, inside = symbol.partition("(")
        parameters = tuple(filter(None, inside.removesuffix(")").split(", ")))
        signature = parameters if has_signature else None
        yield Seam(module, name, kind, feature, why, signature, since, until)


_CONFIG = (
    *_seams(
        ARG_UTILS, ARGUMENTS, "patch", "adds the long flags, rewrites a request for DFlash",
        # Whatever their parameters are: the patch is what refuses a vLLM that is not supported.
        "EngineArgs.add_cli_args", "EngineArgs.create_speculative_config",
    ),
    *_seams(
        ARG_UTILS, ARGUMENTS, "call", "called by the patches of the same names",
        "EngineArgs.add_cli_args(parser)",
        "EngineArgs.create_speculative_config(target_model_config, target_parallel_config)",
    ),
    *_seams(
        ARG_UTILS, ARGUMENTS, "attribute", "reads and rewrites the speculative settings",
        "EngineArgs.speculative_config", "EngineArgs.spec_method", "EngineArgs.spec_model",
        "EngineArgs.spec_tokens", "EngineArgs.additional_config", "EngineArgs.download_dir",
        "EngineArgs.load_format", "EngineArgs.hf_token",
    ),
    *_seams(
        ARG_UTILS, ARGUMENTS, "attribute", "refuses what a drafter does not go along with",
        "EngineArgs.pipeline_parallel_size", "EngineArgs.prefill_context_parallel_size",
        "EngineArgs.decode_context_parallel_size", "EngineArgs.enable_dbo",
        "EngineArgs.ubatch_size", "EngineArgs.tensor_parallel_size",
    ),
    *_seams(
        "vllm.platforms.interface", ARGUMENTS, "call", "captures more graphs on a large GPU",
        "Platform.get_device_total_memory()",
    ),
    *_seams(
        ARG_UTILS, ARGUMENTS, "attribute", "captures graphs up to whole blocks of all requests",
        "EngineArgs.compilation_config", "EngineArgs.cudagraph_capture_sizes",
        "EngineArgs.max_cudagraph_capture_size", "EngineArgs.max_num_seqs",
        "EngineArgs.enforce_eager",
    ),
    *_seams(
        ARG_UTILS, ARGUMENTS, "attribute", "watermarks do not go along with block verification",
        "EngineArgs.watermark_config", since="0.33",
    ),
    *_seams(
        ARG_UTILS, ARGUMENTS, "patch", "the flag's number of drafts is that of a main model's too",
        "EngineArgs.create_engine_config",
    ),
    *_seams(
        ARG_UTILS, ARGUMENTS, "patch", "a main model may be in speculators' newer layout",
        "maybe_override_with_speculators(*, model, revision, ...)",
    ),
    *_seams(
        "vllm.transformers_utils.utils", ARGUMENTS, "call", "finds a redirected drafter",
        "maybe_model_redirect(model)",
    ),
    *_seams(
        "vllm.config.speculative", ARGUMENTS, "attribute", "tells keys that vLLM lacks",
        "SpeculativeConfig",
    ),
    *_seams(
        "vllm.config.load", ARGUMENTS, "call", "names this project's loader",
        "LoadConfig(*, load_format)",
    ),
    *_seams(
        "vllm.config.model", ARGUMENTS, "call", "checks the drafter against the target",
        "ModelConfig.get_hidden_size()", "ModelConfig.get_vocab_size()",
        "ModelConfig.get_total_num_hidden_layers()",
    ),
    *_seams(
        "vllm.config.model", ARGUMENTS, "attribute", "what sets targets apart",
        "ModelConfig.hf_text_config", "ModelConfig.is_hybrid",
    ),
    *_seams(
        "vllm.config.model", SERVE, "attribute", "sizes and dtypes of target and drafter",
        "ModelConfig.max_model_len", "ModelConfig.dtype", "ModelConfig.quantization",
        "ModelConfig.hf_config",
    ),
    *_seams(
        "vllm.config.speculative", SERVE, "attribute", "settings of the speculative method",
        "SpeculativeConfig.method", "SpeculativeConfig.model",
        "SpeculativeConfig.num_speculative_tokens", "SpeculativeConfig.draft_model_config",
        "SpeculativeConfig.draft_load_config", "SpeculativeConfig.draft_sample_method",
        "SpeculativeConfig.enable_adaptive_verification",
        "SpeculativeConfig.num_speculative_tokens_per_batch_size",
        "SpeculativeConfig.draft_parallel_config", "SpeculativeConfig.rejection_sample_method",
    ),
    *_seams(
        "vllm.config.speculative", SERVE, "attribute", "keeps the last cached block of a prefix",
        "SpeculativeConfig.disable_eagle_block_drop", until="0.33",
    ),
    *_seams(
        "vllm.config.vllm", SERVE, "attribute", "configuration of the engine",
        "VllmConfig.speculative_config", "VllmConfig.model_config", "VllmConfig.device_config",
        "VllmConfig.cache_config", "VllmConfig.compilation_config", "VllmConfig.parallel_config",
        "VllmConfig.kv_transfer_config", "VllmConfig.num_speculative_tokens",
        "VllmConfig.use_v2_model_runner",
    ),
    *_seams(
        "vllm.config.parallel", SERVE, "attribute", "ranks that share the models",
        "ParallelConfig.tensor_parallel_size", "ParallelConfig.data_parallel_size",
    ),
    *_seams(
        "vllm.config.compilation", SERVE, "attribute", "compiles where the target is compiled",
        "CompilationConfig.mode", "CompilationMode.NONE",
    ),
    *_seams(
        NIXL_METADATA, NIXL, "patch", "compares drafters instead of where they are staged",
        "_get_speculative_compatibility_factors(vllm_config)",
    ),
    *_seams("vllm.config.cache", SERVE, "attribute", "an FP8 cache shifts drafts",
            "CacheConfig.cache_dtype"),
    *_seams("vllm.config.cache", SERVE, "attribute", "a draft layer's window is its own",
            "CacheConfig.sliding_window"),
    *_seams("vllm.config.device", SERVE, "attribute", "rotary tables are made there",
            "DeviceConfig.device"),
)  # fmt: skip

_MODEL = (
    *_seams(REGISTRY, SERVE, "hook", "registers the drafter's architecture", "ModelRegistry"),
    *_seams(REGISTRY, SERVE, "call", "registers the drafter's architecture",
            "ModelRegistry.register_model(model_arch, model_cls)"),
    *_seams(f"{LOADERS}.utils", SERVE, "call", "whether the target gives its layers' outputs",
            "get_model_cls(model_config)"),
    *_seams("vllm.model_executor.models.interfaces", SERVE, "call",
            "whether the target gives its layers' outputs", "supports_eagle3(model)"),
    *_seams(LOADERS, SERVE, "hook", "registers this project's loader",
            "register_model_loader(load_format)"),
    *_seams(
        f"{LOADERS}.base_loader", SERVE, "subclass", "the core reads the checkpoint",
        "BaseModelLoader.__init__(load_config)", "BaseModelLoader.download_model(model_config)",
        "BaseModelLoader.load_weights(model, model_config)",
    ),
    *_seams(
        MODEL, SERVE, "subclass", "what vLLM's runners call on a drafter",
        "DFlashQwen3ForCausalLM.__init__(*, vllm_config, prefix)",
        "DFlashQwen3ForCausalLM.forward(input_ids, positions, inputs_embeds)",
        "DFlashQwen3ForCausalLM.combine_hidden_states(hidden_states)",
        "DFlashQwen3ForCausalLM.precompute_and_store_context_kv"
        "(context_states, context_positions, context_slot_mapping)",
        "DFlashQwen3ForCausalLM.compute_logits(hidden_states)",
        "DFlashQwen3ForCausalLM.load_weights(weights)",
        "DFlashQwen3ForCausalLM.get_draft_kv_cache_layer_names()",
        "DFlashQwen3ForCausalLM.get_draft_attn_causal()",
    ),
    *_seams("vllm.compilation.decorators", SERVE, "call", "compiles the block's layers",
            "support_torch_compile(*, dynamic_arg_dims)"),
    *_seams("vllm.model_executor.models.utils", SERVE, "call", "names layers",
            "maybe_prefix(prefix, name)"),
    *_seams(
        "vllm.distributed.parallel_state", SERVE, "call", "shards the drafter",
        "get_tensor_model_parallel_rank()", "get_tensor_model_parallel_world_size()",
    ),
    *_seams("vllm.distributed.communication_op", SERVE, "call", "joins the shards' best tokens",
            "tensor_model_parallel_all_gather(input_)"),
    *_seams("vllm.model_executor.layers.layernorm", SERVE, "call", "norms the last layer's output",
            "RMSNorm.forward_native(x)"),
    *_seams("vllm.lora.layers.base", SERVE, "attribute", "an embedding may be wrapped for LoRA",
            "BaseLayerWithLoRA"),
    *_seams("vllm.lora.layers.vocab_parallel_embedding", SERVE, "attribute", "the embedding itself",
            "VocabParallelEmbeddingWithLoRA.base_layer"),
    *_seams("vllm.platforms.interface", SERVE, "attribute", "compiles the context projection",
            "Platform.simple_compile_backend"),
    *_seams("vllm.platforms.interface", SERVE, "call", "tells which seams are in use",
            "Platform.is_cpu()"),
    *_seams(
        ATTENTION, SERVE, "call", "the drafter's paged attention",
        "Attention(num_heads, head_size, scale, *, num_kv_heads, cache_config, quant_config, "
        "per_layer_sliding_window, prefix)",
    ),
    *_seams(ATTENTION, SERVE, "attribute", "writes injected keys and values",
            "Attention.impl", "Attention.kv_cache", "Attention.layer_name"),
    *_seams(ATTENTION, SERVE, "attribute", "windows do not divide the cache",
            "Attention.sliding_window", "Attention.attn_backend"),
    *_seams(ATTENTION, SERVE, "subclass", "windows do not divide the cache",
            "Attention.get_kv_cache_spec(vllm_config)"),
    *_seams(CACHE, SERVE, "attribute", "windows do not divide the cache",
            "FullAttentionSpec.sliding_window"),
    *_seams("vllm.config.model", SERVE, "call", "pages as large as the target's",
            "ModelConfig.get_num_kv_heads(parallel_config)", "ModelConfig.get_head_size()"),
    *_seams("vllm.config.model", SERVE, "attribute", "pages as large as the target's",
            "ModelConfig.use_mla"),
    *_seams("vllm.config.cache", SERVE, "attribute", "pages as large as the target's",
            "CacheConfig.block_size"),
    *_seams(ATTENTION, SERVE, "call", "pages as large as the target's",
            "Attention.get_attn_backend()"),
    *_seams("vllm.config.vllm", SERVE, "call", "pages as large as the target's",
            "get_layers_from_vllm_config(vllm_config, layer_type)"),
    *_seams("vllm.v1.worker.utils", SERVE, "call", "pages as large as the target's",
            "select_common_block_size(kv_manager_block_size, backends)"),
    *_seams(
        CACHE, SERVE, "attribute", "pages as large as the target's", "AttentionSpec.block_size",
        "AttentionSpec.num_kv_heads", "AttentionSpec.head_size",
        "AttentionSpec.page_size_padded", "FullAttentionSpec.head_size_v",
        "SlidingWindowSpec.head_size_v",
    ),
    *_seams(
        "vllm.model_executor.layers.logits_processor", SERVE, "call", "logits of the target's head",
        "LogitsProcessor(vocab_size)", "LogitsProcessor.forward(lm_head, hidden_states)",
    ),
    *_seams(
        LINEAR, SERVE, "subclass", "keys and values alone",
        "QKVParallelLinear.__init__(hidden_size, head_size, total_num_heads, total_num_kv_heads, "
        "*, bias, quant_config, prefix, return_bias, disable_tp, ...)",
    ),
    *_seams(
        LINEAR, SERVE, "call", "the drafter's linears",
        "MergedColumnParallelLinear(input_size, output_sizes, *, bias, quant_config, prefix, "
        "return_bias, disable_tp)",
        "RowParallelLinear(input_size, output_size, *, bias, quant_config, prefix, return_bias, "
        "disable_tp)",
        "ReplicatedLinear(input_size, output_size, *, bias, quant_config, prefix, return_bias, "
        "disable_tp)",
        "UnquantizedLinearMethod.apply(layer, x, bias)",
    ),
    *_seams(
        LINEAR, SERVE, "attribute", "whether a weight is a plain matrix, and its rows",
        "QKVParallelLinear.num_heads", "QKVParallelLinear.head_size",
        "QKVParallelLinear.output_size_per_partition", "QKVParallelLinear.input_size",
        "QKVParallelLinear.quant_method",
    ),
    *_seams(
        f"{QUANTIZATION}.base_config", SERVE, "call", "quantised linears of a drafter",
        "QuantizationConfig.from_config(config)",
    ),
    *_seams(QUANTIZATION, SERVE, "call", "quantised linears of a drafter",
            "get_quantization_config(quantization)"),
    *_seams(LINEAR, SERVE, "call", "checks a drafter's quantised linears",
            "LinearMethodBase.apply(layer, x, bias)"),
    *_seams(
        EMBEDDING, SERVE, "call", "the drafter's own head",
        "ParallelLMHead(num_embeddings, embedding_dim, *, prefix)",
        "UnquantizedEmbeddingMethod.apply(layer, x, bias)",
        "UnquantizedEmbeddingMethod.process_weights_after_loading(layer)",
    ),
    *_seams(
        EMBEDDING, SERVE, "attribute", "which tokens a head's shard holds",
        "ParallelLMHead.shard_indices", "ParallelLMHead.quant_method",
        "VocabParallelEmbeddingShardIndices.num_org_elements",
        "VocabParallelEmbeddingShardIndices.org_vocab_start_index",
    ),
)  # fmt: skip

_GROUPS = (
    *_seams(CACHE_UTILS, CACHE_GROUPS, "patch", "the drafter leaves the target's groups alone",
            "get_kv_cache_groups(vllm_config, kv_cache_spec)", until="0.33"),
    *_seams(CACHE_PLANNING, CACHE_GROUPS, "patch", "the drafter leaves the target's groups alone",
            "get_kv_cache_groups(vllm_config, kv_cache_spec)", since="0.33"),
    *_seams(CACHE_UTILS, CACHE_GROUPS, "call", "pages of one size",
            "unify_kv_cache_spec_page_size(kv_cache_spec)", until="0.33"),
    *_seams(CACHE_PLANNING, CACHE_GROUPS, "call", "pages of one size",
            "unify_kv_cache_spec_page_size(kv_cache_spec)", since="0.33"),
    *_seams(ENGINE_CORE, CACHE_GROUPS, "patch", "logs what the drafter takes of the cache",
            "update_kv_cache_capacity"),
    *_seams(CACHE_UTILS, CACHE_GROUPS, "call", "logs what the drafter takes of the cache",
            "update_kv_cache_capacity(vllm_config, kv_cache_config)"),
    *_seams(
        CACHE, CACHE_GROUPS, "call", "makes groups",
        "KVCacheGroupSpec(layer_names, kv_cache_spec)", "KVCacheSpec.merge(specs)",
        "UniformTypeKVCacheSpecs.from_specs(kv_cache_specs)",
        "replace_as(spec, target_cls, *, drop)",
        "KVCacheSpec.max_memory_usage_bytes(vllm_config)",
    ),
    *_seams(
        CACHE, CACHE_GROUPS, "attribute", "makes groups",
        "SlidingWindowSpec.sliding_window", "UniformTypeKVCacheSpecs.kv_cache_specs",
        "KVCacheSpec.page_size_bytes", "KVCacheConfig.num_blocks",
    ),
    *_seams("vllm.config.cache", CACHE_GROUPS, "attribute", "prefix hits may end within blocks",
            "CacheConfig.enable_prefix_caching", "CacheConfig.prefix_match_unit"),
)  # fmt: skip

_WORKER = (
    *_seams(WORKER, SERVE, "patch", "checks the drafter when the worker is warm",
            "Worker.compile_or_warm_up_model()"),
    *_seams(WORKER, SERVE, "patch", "takes new weights for the drafter",
            "Worker._set_draft_weight_update_target()"),
    *_seams(WORKER, SERVE, "attribute", "takes new weights for the drafter",
            "Worker.speculative_config", "Worker.weight_transfer_engine"),
    *_seams(TRANSFER, SERVE, "call", "takes new weights for the drafter",
            "WeightTransferEngine.set_weight_update_target(model, model_config)"),
    *_seams(TRANSFER, SERVE, "attribute", "takes new weights for the drafter",
            "WeightTransferEngine.model", "WeightTransferEngine.model_config"),
    *_seams(WORKER, SERVE, "patch", "rounds the target's new head",
            "Worker.finish_weight_update()", "Worker.reload_weights(...)"),
    *_seams(WORKER, SERVE, "patch", "attaches counts to a step's output",
            "Worker.sample_tokens(grammar_output)"),
    *_seams("vllm.v1.worker.gpu.async_utils", V2, "attribute", "carries counts of a step",
            "AsyncOutput.model_runner_output"),
    *_seams("vllm.v1.worker.gpu_model_runner", V1, "attribute", "carries counts of a step",
            "AsyncGPUModelRunnerOutput._model_runner_output"),
    *_seams("vllm.config.compilation", SERVE, "attribute", "tells the attention back ends",
            "CompilationConfig.static_forward_context"),
    *_seams("vllm.model_executor.layers.attention_layer_base", SERVE, "call",
            "tells the attention back ends", "AttentionLayerBase.get_attn_backend()"),
    *_seams(METADATA, SERVE, "call", "tells the attention back ends",
            "AttentionBackend.get_name()"),
    *_seams(SPECULATOR, V2, "attribute", "tells whether drafts use a graph",
            "DFlashSpeculator.query_cudagraph_manager"),
    *_seams("vllm.v1.worker.gpu.cudagraph_utils", V2, "attribute",
            "tells whether drafts use a graph", "CudaGraphManager.cudagraph_mode"),
    *_seams(WORKER, SERVE, "call", "reaches the models", "Worker.get_draft_model()",
            "Worker.get_model()"),
    *_seams(WORKER, SERVE, "patch", "loads the drafter again after sleep level 2",
            "Worker.sleep(level)", "Worker.wake_up(tags)"),
    *_seams(WORKER, SERVE, "hook", "adds methods for collective_rpc", "Worker"),
    *_seams(CPU_WORKER, CPU, "patch", "checks the drafter when the worker is warm",
            "CPUWorker.compile_or_warm_up_model()"),
    *_seams(
        WORKER, SERVE, "call", "drafts the recorded prompts at start",
        "Worker.execute_model(scheduler_output)", "Worker.sample_tokens(grammar_output)",
    ),
    *_seams(WORKER, SERVE, "attribute", "drafts the recorded prompts at start",
            "Worker.model_runner", "Worker.vllm_config", "Worker.model_config"),
    *_seams("vllm.v1.worker.gpu_model_runner", V1, "attribute", "reads the drafts at start",
            "GPUModelRunner._draft_token_ids", "GPUModelRunner.kv_cache_config"),
    *_seams(
        RUNNER, V2, "patch", "adapters follow rows of logits; schedules have their graph's layout",
        "GPUModelRunner.prepare_inputs(scheduler_output, batch_req_state, batch_desc, ...)",
    ),
    *_seams(RUNNER, V2, "attribute", "adapters of the target follow rows of logits",
            "GPUModelRunner.lora_config", "GPUModelRunner.lora_state",
            "GPUModelRunner.vllm_config"),
    *_seams(LORA, V2, "patch", "adapters of the target follow rows of logits",
            "LoraState.make_lora_inputs(...)"),
    *_seams("vllm.v1.worker.gpu.input_batch", V2, "attribute", "counts rows of logits",
            "InputBatch.cu_num_logits_np"),
    *_seams(RUNNER, V2, "attribute", "reads the drafts at start",
            "GPUModelRunner.speculator", "GPUModelRunner.kv_cache_config"),
    *_seams(OUTPUT, SERVE, "call", "drafts the recorded prompts at start",
            "SchedulerOutput.make_empty()"),
    *_seams(
        OUTPUT, SERVE, "call", "drafts the recorded prompts at start",
        "NewRequestData(*, req_id, prompt_token_ids, mm_features, sampling_params, pooling_params, "
        "block_ids, num_computed_tokens, lora_request, prefill_token_ids)",
    ),
    *_seams(
        OUTPUT, SERVE, "attribute", "drafts the recorded prompts at start",
        "SchedulerOutput.num_spec_tokens_to_schedule", "SchedulerOutput.num_common_prefix_blocks",
        "SchedulerOutput.scheduled_new_reqs", "SchedulerOutput.num_scheduled_tokens",
        "SchedulerOutput.total_num_scheduled_tokens", "SchedulerOutput.finished_req_ids",
    ),
    *_seams("vllm.sampling_params", SERVE, "call", "drafts the recorded prompts at start",
            "SamplingParams(*, max_tokens, temperature)"),
    *_seams(
        CACHE, SERVE, "attribute", "cache blocks of the recorded prompts; causality by group",
        "KVCacheConfig.kv_cache_groups", "KVCacheGroupSpec.layer_names",
        "KVCacheGroupSpec.kv_cache_spec", "KVCacheSpec.block_size",
    ),
)  # fmt: skip

_V2 = (
    *_seams(SPECULATOR, V2, "patch", "makes this project's speculator",
            "DFlashSpeculator(vllm_config, device)"),
    *_seams(
        SPECULATOR, V2, "subclass", "the V2 runner's speculator",
        "DFlashSpeculator.__init__(vllm_config, device)",
        "DFlashSpeculator.load_draft_model(target_model, target_attn_layer_names)",
        "DFlashSpeculator.set_attn(model_state, kv_cache_config, ...)",
        "DFlashSpeculator.sample_draft(hidden_states, sample_src_positions, idx_mapping, "
        "temperature, seeds, draft_step, draft_logits, ...)",
        "DFlashSpeculator.observe_verification(idx_mapping, num_sampled, num_rejected)",
        "DFlashSpeculator.init_cudagraph_manager(cudagraph_mode)", "DFlashSpeculator.capture()",
        "DFlashSpeculator._generate_draft(...)",
    ),
    *_seams(SPECULATOR, V2, "subclass", "the V2 runner's speculator",
            "DFlashSpeculator.propose(input_batch, ...)", until="0.33"),
    *_seams(
        SPECULATOR, V2, "subclass", "injects without drafting where nothing will be verified",
        "DFlashSpeculator.propose(input_batch, *, num_speculative_tokens, ...)", since="0.33",
    ),
    *_seams(SPECULATOR, V2, "call", "predicts acceptance from a selector's scores",
            "DFlashSpeculator._maybe_predict_acceptance(logits, idx_mapping, draft_step)"),
    *_seams(
        SPECULATOR, V2, "attribute", "layout of the block and of what drafts are drawn from",
        "DFlashSpeculator.model", "DFlashSpeculator.device", "DFlashSpeculator.speculative_config",
        "DFlashSpeculator.sample_from_anchor", "DFlashSpeculator.num_query_per_req",
        "DFlashSpeculator.num_speculative_steps", "DFlashSpeculator.use_acceptance_estimator",
        "DFlashSpeculator.use_local_argmax_reduction", "DFlashSpeculator.draft_logits",
        "DFlashSpeculator.draft_tokens", "DFlashSpeculator.input_buffers",
        "DFlashSpeculator.acceptance_estimator",
    ),
    *_seams(
        SPECULATOR, V2, "attribute", "drafts shorter blocks, with graphs of their own",
        "DFlashSpeculator.sample_col", "DFlashSpeculator.max_num_reqs",
        "DFlashSpeculator.vllm_config",
    ),
    *_seams("vllm.v1.worker.gpu.spec_decode.dflash.cudagraph", V2, "call",
            "makes graphs of shorter blocks",
            "DFlashCudaGraphManager(vllm_config, device, cudagraph_mode, *, decode_query_len)"),
    *_seams(GRAPHS, V2, "attribute",
            "counts the graphs of shorter blocks", "CudaGraphManager.graphs"),
    *_seams("vllm.v1.worker.gpu.input_batch", V2, "attribute",
            "schedules of replayed passes have the layout of their graph",
            "InputBatch.max_query_len", "InputBatch.num_scheduled_tokens",
            "InputBatch.num_tokens_after_padding"),
    *_seams("vllm.config.compilation", V2, "call",
            "schedules of replayed passes have the layout of their graph",
            "CUDAGraphMode.separate_routine()"),
    *_seams(
        GRAPHS, V2, "patch", "captures whole passes that read prompts",
        "ModelCudaGraphManager.capture(model, model_state, input_buffers, intermediate_tensors, "
        "block_tables, attn_groups, ...)", since="0.32",
    ),
    *_seams(
        GRAPHS, V2, "attribute", "captures whole passes that read prompts",
        "CudaGraphManager._capture_descs", "CudaGraphManager._candidates",
        "CudaGraphManager.vllm_config", "CudaGraphManager.max_num_reqs", since="0.32",
    ),
    *_seams(
        GRAPHS, V2, "call", "captures whole passes that read prompts",
        "BatchExecutionDescriptor(cg_mode, num_tokens, num_reqs, ...)", since="0.32",
    ),
    *_seams("vllm.config.compilation", V2, "attribute", "captures whole passes that read prompts",
            "CUDAGraphMode.FULL_AND_PIECEWISE", "CUDAGraphMode.FULL", "CUDAGraphMode.PIECEWISE",
            "CompilationConfig.cudagraph_mode", since="0.32"),
    *_seams("vllm.config.model", V2, "attribute", "tells where prompts may be captured",
            "ModelConfig.enable_prompt_embeds", since="0.32"),
    *_seams("vllm.config.vllm", V2, "attribute", "tells where passes of mixed lengths can run",
            "VllmConfig.lora_config"),
    *_seams("vllm.config.cache", V2, "attribute", "tells where prompts may be captured",
            "CacheConfig.kv_sharing_fast_prefill", since="0.32"),
    *_seams("vllm.v1.worker.utils", V2, "attribute", "tells where passes of mixed lengths can run",
            "AttentionGroup.backend"),
    *_seams("vllm.v1.worker.utils", V2, "attribute", "asks what the target's graphs hold",
            "AttentionGroup.kv_cache_spec", since="0.32"),
    *_seams("vllm.v1.worker.utils", V2, "call", "asks what the target's graphs hold",
            "AttentionGroup.get_metadata_builder(ubatch_id)", since="0.32"),
    *_seams(METADATA, V2, "call", "asks what the target's graphs hold",
            "AttentionMetadataBuilder.get_cudagraph_support(vllm_config, kv_cache_spec)"),
    *_seams("vllm.v1.attention.backends.flash_attn", V2, "attribute",
            "knows the back ends whose graphs hold prompts", "FlashAttentionMetadataBuilder",
            "FlashAttentionMetadataBuilder.aot_schedule", "FlashAttentionMetadataBuilder.headdim",
            since="0.32"),
    *_seams("vllm.v1.attention.backends.flash_attn", V2, "call",
            "knows where schedules are made ahead of a pass",
            "_get_sliding_window_configs(vllm_config)", since="0.32"),
    *_seams("vllm.v1.attention.backends.triton_attn", V2, "attribute",
            "knows the back ends whose graphs hold prompts", "TritonAttentionMetadataBuilder",
            since="0.32"),
    *_seams("vllm.config.compilation", V2, "attribute", "captures few numbers of requests",
            "CompilationConfig.cudagraph_capture_sizes",
            "CompilationConfig.max_cudagraph_capture_size"),
    *_seams("vllm.v1.worker.gpu.input_batch", V2, "attribute", "anchors of the blocks",
            "InputBuffers.input_ids"),
    *_seams(RUNNER, V2, "patch", "a selector draws within the requests' top-k and top-p",
            "GPUModelRunner.load_model(...)"),
    *_seams(RUNNER, V2, "attribute", "a selector draws within the requests' top-k and top-p",
            "GPUModelRunner.sampler"),
    *_seams("vllm.v1.worker.gpu.sample.sampler", V2, "attribute",
            "a selector draws within the requests' top-k and top-p", "Sampler.sampling_states"),
    *_seams("vllm.v1.worker.gpu.sample.states", V2, "attribute",
            "a selector draws within the requests' top-k and top-p",
            "SamplingStates.top_k", "SamplingStates.top_p"),
    *_seams("vllm.v1.worker.gpu.buffer_utils", V2, "attribute",
            "a selector draws within the requests' top-k and top-p",
            "UvaBackedTensor.np", "UvaBackedTensor.gpu"),
)  # fmt: skip

_ADAPTIVE = (
    *_seams(
        RUNNER, ADAPTIVE, "patch", "wraps vLLM's manager",
        "maybe_create_adaptive_verification_manager(*, vllm_config, attn_groups, req_states, "
        "query_start_loc, num_bonus_tokens, max_total_logits, ...)",
    ),
    *_seams(
        RUNNER, ADAPTIVE, "patch", "turns it on where vLLM can run it",
        "GPUModelRunner.__init__(vllm_config, ...)",
    ),
    *_seams(
        "vllm.config.vllm", ADAPTIVE, "attribute", "tells where vLLM can run it",
        "VllmConfig.aux_output_config",
    ),
    *_seams("vllm.config.model", ADAPTIVE, "attribute", "tells where vLLM can run it",
            "ModelConfig.return_sampling_mask"),
    *_seams("vllm.v1.attention.selector", ADAPTIVE, "call", "asks the target's back end",
            "get_attn_backend(head_size, dtype, kv_cache_dtype)"),
    *_seams(METADATA, ADAPTIVE, "call", "asks what passes its graphs hold",
            "AttentionBackend.get_builder_cls()"),
    *_seams(METADATA, ADAPTIVE, "attribute", "asks what passes its graphs hold",
            "AttentionCGSupport.ALWAYS"),
    *_seams(RUNNER, ADAPTIVE, "attribute", "turns it off where vLLM finds out that it cannot",
            "GPUModelRunner.rejection_sampler", "GPUModelRunner.speculative_config"),
    *_seams("vllm.v1.worker.gpu.spec_decode.rejection_sampler", ADAPTIVE, "attribute",
            "turns it off where vLLM finds out that it cannot",
            "RejectionSampler.enable_adaptive_verification"),
    *_seams(RUNNER, ADAPTIVE, "call", "runs the steps that are profiled at start",
            "GPUModelRunner._dummy_run(num_tokens, *, uniform_decode, context_len)"),
    *_seams(RUNNER, ADAPTIVE, "attribute", "attaches counts to a step's output",
            "GPUModelRunner.adaptive_verification"),
    *_seams(
        MANAGER, ADAPTIVE, "subclass", "the runner calls this project's manager in its place",
        "AdaptiveVerificationManager.batches_to_profile(capture_sizes)",
        "AdaptiveVerificationManager.set_initial_cost_curves(samples)",
        "AdaptiveVerificationManager.add_request(req_idx)",
        "AdaptiveVerificationManager.get_num_tokens(num_tokens_per_req, draft_tokens)",
        "AdaptiveVerificationManager.compact_batch"
        "(num_draft_tokens_per_req, num_scheduled_tokens, cu_num_logits_np)",
        "AdaptiveVerificationManager.reallocate_drafts(req_ids, idx_mapping)",
        "AdaptiveVerificationManager.record_confidences(confidence_probs, input_batch)",
    ),
    *_seams(MANAGER, ADAPTIVE, "attribute", "tells compact_batch how many drafts are verified",
            "AdaptiveVerificationManager._batch_budget"),
    *_seams(MANAGER, ADAPTIVE, "attribute", "reallocate_drafts returns a fourth value",
            "AdmittedDraftCounts", since="0.33"),
    *_seams(
        "vllm.v1.worker.gpu.async_utils", ADAPTIVE, "attribute", "step times profiled at start",
        "StepTimingSample.forward_ms", "StepTimingSample.drafter_ms",
        "StepTimingSample.num_target_tokens", "StepTimingSample.num_reqs",
        "StepTimingSample.full_cudagraph",
    ),
    *_seams(
        "vllm.v1.worker.gpu.states", ADAPTIVE, "attribute", "size of the batch",
        "RequestState.num_speculative_steps", "RequestState.max_num_reqs", "RequestState.device",
    ),
    *_seams("vllm.v1.worker.gpu.input_batch", ADAPTIVE, "attribute", "slots of the requests",
            "InputBatch.idx_mapping"),
    *_seams("vllm.v1.worker.gpu.input_batch", ADAPTIVE, "attribute", "whose drafts a step made",
            "InputBatch.req_ids"),
    *_seams("vllm.utils.torch_utils", ADAPTIVE, "call", "sends counts to the device",
            "async_tensor_h2d(data, *, device)"),
    *_seams(
        ESTIMATOR, ADAPTIVE, "attribute", "predicts acceptance from the head's own pass",
        "OnlineAcceptanceEstimator.slope", "OnlineAcceptanceEstimator.intercepts",
        "OnlineAcceptanceEstimator.features", "OnlineAcceptanceEstimator.predictions",
        "OnlineAcceptanceEstimator.REFIT_INTERVAL",
    ),
    *_seams(ESTIMATOR, ADAPTIVE, "call", "compiles its kernels at start",
            "OnlineAcceptanceEstimator.step(idx_mapping, num_sampled, num_rejected)"),
    *_seams("vllm.distributed.parallel_state", ADAPTIVE, "call", "ranks agree on a length",
            "get_tp_group()"),
    *_seams(
        "vllm.distributed.parallel_state", ADAPTIVE, "attribute", "ranks agree on a length",
        "GroupCoordinator.world_size", "GroupCoordinator.ranks", "GroupCoordinator.cpu_group",
    ),
)  # fmt: skip

_WAITING = (
    *_seams(ENGINE_CORE, WAITING, "patch", "prompts wait for others",
            "EngineCore._should_throttle_prefills()"),
    *_seams(ENGINE_CORE, WAITING, "attribute", "prompts wait for others",
            "EngineCore.scheduler", "EngineCore.model_executor"),
    *_seams("vllm.v1.executor.uniproc_executor", WAITING, "attribute", "reads the policy",
            "UniProcExecutor.driver_worker"),
    *_seams("vllm.v1.worker.worker_base", WAITING, "attribute", "reads the policy",
            "WorkerWrapperBase.worker"),
    *_seams(SCHEDULER, WAITING, "call", "prompts wait for others",
            "Scheduler.get_request_counts()"),
    *_seams(
        SCHEDULER, WAITING, "attribute", "prompts wait for others",
        "Scheduler.max_num_running_reqs", "Scheduler.prefill_capacity_bound",
        "Scheduler.deferred_waiting", "Scheduler.pause_state", "Scheduler.scheduler_config",
    ),
    *_seams("vllm.config.scheduler", WAITING, "attribute", "leaves vLLM's own interval",
            "SchedulerConfig.prefill_schedule_interval"),
    *_seams("vllm.v1.request", WAITING, "attribute", "prompts wait for others",
            "Request.is_prefill_chunk"),
)  # fmt: skip

_METRICS = (
    *_seams(
        SPEC_METRICS, METRICS, "patch", "feeds the drafter's gauges",
        "SpecDecodingProm.__init__(speculative_config, labelnames, per_engine_labelvalues, ...)",
        "SpecDecodingProm.observe(spec_decoding_stats, engine_idx)",
    ),
    *_seams(SPEC_METRICS, METRICS, "attribute", "acceptance of a step",
            "SpecDecodingStats.num_drafts", "SpecDecodingStats.num_accepted_tokens_per_pos"),
    *_seams(LOGGERS, METRICS, "attribute", "holds the drafter's gauges",
            "PrometheusStatLogger.spec_decoding_prom"),
    *_seams(LOGGERS, METRICS, "patch", "tells how the engine runs the drafter",
            "PrometheusStatLogger.__init__(vllm_config, ...)"),
    *_seams("vllm.config.model", METRICS, "attribute", "tells whether the target reads images",
            "ModelConfig.is_multimodal_model"),
    *_seams(SCHEDULER, METRICS, "patch", "sends counts with a step's statistics",
            "Scheduler.update_from_output(scheduler_output, model_runner_output)"),
    *_seams(SCHEDULER, METRICS, "attribute", "what the drafter takes of the cache",
            "Scheduler.vllm_config"),
    *_seams(SCHEDULER, METRICS, "attribute", "the last request's counts are sent at once",
            "Scheduler.running"),
    *_seams(LOGGERS, METRICS, "patch", "exports the counts",
            "PrometheusStatLogger.record(scheduler_stats, *, engine_idx, ...)"),
    *_seams("vllm.v1.engine", METRICS, "attribute", "carries a step's statistics",
            "EngineCoreOutputs.scheduler_stats"),
    *_seams("vllm.v1.engine", METRICS, "subclass", "carries the counts",
            "EngineCoreOutputs.__post_init__()"),
    *_seams(CORE_CLIENT, METRICS, "patch", "receives the counts", "EngineCoreOutputs"),
)  # fmt: skip

_V1 = (
    *_seams(PROPOSER, V1, "patch", "makes this project's proposer",
            "DFlashProposer(vllm_config, device, runner)"),
    *_seams(
        PROPOSER, V1, "subclass", "the V1 runner's proposer",
        "DFlashProposer.__init__(vllm_config, device, runner)",
        "DFlashProposer._maybe_share_embeddings(target_language_model)",
        "DFlashProposer._maybe_share_lm_head(target_language_model)",
        "DFlashProposer.set_inputs_first_pass(target_token_ids, next_token_ids, target_positions, "
        "target_hidden_states, token_indices_to_sample, cad, num_rejected_tokens_gpu)",
        "DFlashProposer._sample_draft_tokens(hidden_states, sampling_metadata)",
    ),
    *_seams(
        PROPOSER, V1, "attribute", "buffers of injection and of the block",
        "DFlashProposer.model", "DFlashProposer.num_speculative_tokens",
        "DFlashProposer.max_model_len", "DFlashProposer.block_size", "DFlashProposer.input_ids",
        "DFlashProposer.positions", "DFlashProposer.arange", "DFlashProposer.token_arange_np",
        "DFlashProposer.parallel_drafting_token_id", "DFlashProposer.dflash_causal",
        "DFlashProposer._context_positions_buffer", "DFlashProposer._context_slot_mapping_buffer",
        "DFlashProposer._slot_mapping_buffer", "DFlashProposer._enable_probabilistic_draft_probs",
    ),
    *_seams(PROPOSER, V1, "write", "context rows of the next injection",
            "DFlashProposer._dflash_num_context", "DFlashProposer._dflash_hidden_states"),
    *_seams(
        METADATA, V1, "call", "metadata of the block's pass",
        "CommonAttentionMetadata(*, query_start_loc, seq_lens, query_start_loc_cpu, "
        "seq_lens_cpu_upper_bound, num_reqs, num_actual_tokens, max_query_len, max_seq_len, "
        "block_table_tensor, slot_mapping, causal)",
        "CommonAttentionMetadata.batch_size()",
    ),
    *_seams("vllm.v1.sample.metadata", V1, "attribute", "temperatures and limits of the drafts",
            "SamplingMetadata.all_greedy", "SamplingMetadata.temperature",
            "SamplingMetadata.top_k", "SamplingMetadata.top_p"),
    *_seams(CPU_KERNELS, V1_ON_CPU, "patch", "temperatures were expanded into a copy",
            "_expand_kernel_impl(output, input_val, cu_num_tokens, replace_from, replace_to, "
            "MAX_NUM_TOKENS)"),
    *_seams(REJECTION, V1, "patch", "fails where no request has a draft to verify",
            "apply_sampling_constraints(logits, ...)"),
)  # fmt: skip

# Attributes that this adapter adds to vLLM's objects.
ATTACHED, GROUPS = "dflash_counts", "dflash_groups"
TOLD, UNSENT = "dflash_told", "dflash_unsent"

SEAMS = (
    *_CONFIG, *_MODEL, *_GROUPS, *_WORKER, *_V2, *_ADAPTIVE, *_WAITING, *_METRICS, *_V1,
)  # fmt: skip


@cache
def surface() -> Surface:
    """The table for the installed vLLM, and what was patched from it in this process."""
    return Surface("vllm", compat.installed(), SEAMS)


def verify_frontend() -> None:
    """Check what the processes need that read the flags, schedule and export metrics.

    Raises:
        DFlashError: vLLM lacks a symbol, or has another signature.
    """
    surface().verify({ARGUMENTS, METRICS, WAITING, CACHE_GROUPS}, load=True)


def verify_worker(vllm_config: Any) -> None:
    """Check what a worker needs, when it makes the drafter.

    Raises:
        DFlashError: vLLM lacks a symbol, has another signature, or was never patched.
    """
    from vllm.platforms import current_platform

    is_v2 = vllm_config.use_v2_model_runner
    features = {SERVE, V2 if is_v2 else V1}
    if current_platform.is_cpu():
        features |= {CPU} if is_v2 else {CPU, V1_ON_CPU}
    if vllm_config.speculative_config.enable_adaptive_verification:
        features.add(ADAPTIVE)
    surface().verify(features)


def attach(value: Any, counts: dict[str, int]) -> None:
    """Keep counts on one of vLLM's objects, which carries them to where they are read."""
    setattr(value, ATTACHED, counts)


def attached(value: Any) -> dict[str, int] | None:
    """The counts that ``attach`` put on one of vLLM's objects, or None."""
    return getattr(value, ATTACHED, None)


def target_modules(target: Any) -> tuple[Any, Any]:
    """The embedding and the head of a target model, or None for one that it lacks.

    vLLM's model classes hold them under several names.
    """
    language, inner = _language_model(target)
    embedding = getattr(inner, "embed_tokens", None) or getattr(inner, "embedding", None)
    head = getattr(language, "lm_head", None) or getattr(target, "lm_head", None)
    return embedding, head


def final_norm(target: Any) -> Any:
    """The norm behind a target model's last layer.

    vLLM gives that layer's output before the norm.

    Raises:
        DFlashError: the model has none of that name.
    """
    norm = getattr(_language_model(target)[1], "norm", None)
    if norm is None:
        raise DFlashError(
            f"the drafter reads the output of the target's last layer after the final norm, and "
            f"{type(target).__name__} has no norm: use the Transformers engine, or set "
            "DFLASH_PLUGIN=off to use vLLM's own DFlash"
        )
    return norm


def _language_model(target: Any) -> tuple[Any, Any]:
    """The language model of a target, and its decoder."""
    language = target.get_language_model() if hasattr(target, "get_language_model") else target
    return language, getattr(language, "model", language)
