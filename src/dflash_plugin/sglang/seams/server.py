"""The server around the models: arguments, metrics, the check of the drafter at start."""

from __future__ import annotations

from dflash_plugin.sglang.seams.features import ARGUMENTS, KNOWN_ANSWERS, META_INFO, METRICS
from dflash_plugin.sglang.seams.rows import members, rows

ROWS = (
    *rows(
        "arg_groups.speculative_hook", "hook", ARGUMENTS,
        "stages the drafter before SGLang reads its configuration",
        "handle_speculative_decoding", signature=("server_args",),
    ),
    *rows(
        "arg_groups.speculative_hook", "hook", ARGUMENTS,
        "lets the check of the device pass on a CPU",
        "_handle_dflash", signature=("server_args",),
    ),
    *rows(
        "plugins.hook_registry", "call", ARGUMENTS, "registers our hooks",
        "HookRegistry.register", signature=("target", "hook", "hook_type"),
    ),
    *rows(
        "arg_groups.model_override_base", "call", ARGUMENTS, "reads arguments with decisions",
        "resolving_view", signature=("server_args",), since="0.5.19",
    ),
    *rows(
        "arg_groups.overrides", "call", ARGUMENTS, "decides arguments",
        "declare_resolution", signature=("server_args", "source"), since="0.5.19",
    ),
    *rows(
        "utils.hf_transformers.config", "call", ARGUMENTS, "reads the target's configuration",
        "get_config",
    ),
    *rows(
        "plugins.hook_registry", "attribute", ARGUMENTS, "registers our hooks",
        "HookType.AROUND", "HookType.BEFORE",
    ),
    *rows(
        "managers.tokenizer_manager", "hook", META_INFO,
        "adds the acceptance by position to meta_info",
        "TokenizerManager._calculate_spec_decoding_metrics", signature=("meta_info", "..."),
    ),
    *rows(
        "managers.scheduler", "hook", METRICS, "adds the drafter to /server_info",
        "Scheduler.get_internal_state", signature=("recv_req",),
    ),
    *rows(
        "managers.scheduler_components.batch_result_processor", "hook", METRICS,
        "counts accepted drafts",
        "SchedulerBatchResultProcessor._resolve_spec_v2_tokens", signature=("result", "batch"),
    ),
    *rows(
        "managers.scheduler", "attribute", METRICS, "finds our worker and the arguments",
        *members("Scheduler", "draft_worker", "server_args"),
    ),
    *rows(
        "managers.scheduler_components.batch_result_processor", "attribute", METRICS,
        "finds our worker", "SchedulerBatchResultProcessor.draft_worker",
    ),
    *rows(
        "managers.io_struct", "attribute", METRICS, "adds the drafter to /server_info",
        "GetInternalStateReqOutput.internal_state",
    ),
    *rows(
        "managers.utils", "attribute", METRICS, "counts accepted drafts",
        *members(
            "GenerationBatchResult",
            "num_correct_drafts_per_req_cpu", "speculative_num_draft_tokens",
        ),
    ),
    *rows(
        "managers.scheduler", "hook", KNOWN_ANSWERS,
        "checks the drafter and begins to count when everything is warm",
        "dispatch_event_loop", signature=("scheduler",),
    ),
    *rows(
        "managers.scheduler_components.output_streamer", "subclass", KNOWN_ANSWERS,
        "replaced while the drafter is checked: no client gets these tokens",
        "SchedulerOutputStreamer.stream_output", signature=("reqs", "return_logprob", "..."),
    ),
    *rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "Scheduler.get_next_batch_to_run", signature=("*", "running_batch", "last_batch"),
    ),
    *rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "Scheduler.run_batch", signature=("batch",),
    ),
    *rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "Scheduler.process_batch_result", signature=("batch", "result"),
    ),
    *rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "Scheduler._add_request_to_queue", signature=("req",),
    ),
    *rows(
        "managers.scheduler", "call", KNOWN_ANSWERS, "empties the cache after the check",
        "Scheduler.flush_cache", signature=(),
    ),
    *rows(
        "utils.common", "call", KNOWN_ANSWERS, "the mode of gradients in which the scheduler runs",
        "DynamicGradMode",
    ),
    *rows(
        "managers.schedule_batch", "call", KNOWN_ANSWERS, "makes requests of recorded prompts",
        "Req",
        signature=(
            "*", "rid", "origin_input_text", "origin_input_ids", "sampling_params", "vocab_size",
        ),
    ),
    *rows(
        "managers.schedule_batch", "call", KNOWN_ANSWERS, "runs the recorded prompts",
        "ScheduleBatch.copy", "Req.finished", signature=(),
    ),
    *rows(
        "sampling.sampling_params", "call", KNOWN_ANSWERS, "makes requests of recorded prompts",
        "SamplingParams", signature=("*", "max_new_tokens", "temperature", "ignore_eos"),
    ),
    *rows(
        "sampling.sampling_params", "call", KNOWN_ANSWERS, "makes requests of recorded prompts",
        "SamplingParams.normalize", signature=("tokenizer",),
    ),
    *rows(
        "managers.scheduler", "attribute", KNOWN_ANSWERS, "runs the recorded prompts",
        *members("Scheduler", "tokenizer", "output_streamer", "running_batch", "last_batch"),
    ),
    *rows(
        "configs.model_config", "attribute", KNOWN_ANSWERS, "leaves out prompts that are too long",
        "ModelConfig.context_len",
    ),
)  # fmt: skip
