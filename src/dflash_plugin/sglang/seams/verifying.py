"""The verify pass: its input, sampling and penalties."""

from __future__ import annotations

from dflash_plugin.sglang.seams.features import VERIFYING
from dflash_plugin.sglang.seams.rows import WORKER, members, rows

ROWS = (
    *rows(
        "managers.tokenizer_manager", "hook", VERIFYING, "gives each answer of a request its seed",
        "TokenizerManager._send_one_request", signature=("tokenized_obj",),
    ),
    *rows(
        WORKER, "patch", VERIFYING, "applies our penalties to the target's logits",
        "apply_dflash_verify_logits_adjustments",
        signature=("*", "next_token_logits", "sampling_info", "draft_token_num"),
    ),
    *rows(
        WORKER, "patch", VERIFYING, "accepts drafts of requests that sample",
        "compute_dflash_sampling_correct_drafts_and_bonus",
        signature=("*", "candidates", "next_token_logits", "sampling_info", "..."),
    ),
    *rows(
        WORKER, "patch", VERIFYING, "accepts drafts of cut passes",
        "compute_dflash_correct_drafts_and_bonus",
        signature=("*", "candidates", "target_predict"),
    ),
    *rows(
        WORKER, "patch", VERIFYING, "samples on every device",
        "is_dflash_sampling_verify_available", signature=(),
    ),
    *rows(
        WORKER, "patch", VERIFYING, "compacts the input of a verify pass",
        "DFlashVerifyInput",
    ),
    *rows(
        WORKER, "subclass", VERIFYING, "accepts every batch that samples",
        "DFlashWorkerV2._validate_phase1_sampling_support", signature=("batch",),
    ),
    *rows(
        WORKER, "subclass", VERIFYING, "asks for logits where sampling or penalties need them",
        "DFlashWorkerV2._can_skip_verify_logits", signature=("batch", "sampling_info"),
        since="0.5.23",
    ),
    *rows(
        "speculative.dflash_info", "subclass", VERIFYING, "cuts the input to the selected rows",
        "DFlashVerifyInput.prepare_for_verify", signature=("batch", "target_worker", "..."),
    ),
    *rows(
        "managers.tp_worker", "subclass", VERIFYING,
        "replaced on the target's worker: takes the output of a cut pass",
        "TpModelWorker.forward_batch_generation", signature=("batch", "..."),
    ),
    *rows(
        "model_executor.model_runner", "subclass", VERIFYING,
        "replaced on the target's runner: draws the first token with the request's seed",
        "ModelRunner.sample", signature=("logits_output", "forward_batch"),
    ),
    *rows(
        "layers.sampler", "call", VERIFYING, "applies custom logit processors to blocks",
        "apply_custom_logit_processor",
        signature=("logits", "sampling_batch_info", "*", "num_tokens_in_batch"),
    ),
    *rows(
        "model_executor.model_runner", "call", VERIFYING, "draws the first token",
        "ModelRunner._preprocess_logits", signature=("logits_output", "sampling_info"),
    ),
    *rows(
        "model_executor.forward_batch_info", "call", VERIFYING, "tells kinds of passes apart",
        *members("ForwardMode", "is_extend", "is_idle", "is_target_verify"),
    ),
    *rows(
        "managers.utils", "attribute", VERIFYING, "reads what a pass gave",
        *members(
            "GenerationBatchResult",
            "next_token_ids", "accept_lens", "logits_output", "can_run_cuda_graph",
        ),
    ),
    *rows(
        "managers.schedule_batch", "attribute", VERIFYING, "reads a batch",
        *members(
            "ScheduleBatch",
            "reqs", "decoding_reqs", "forward_mode", "is_extend_in_batch", "seq_lens",
            "sampling_info", "spec_info",
        ),
    ),
    *rows(
        "managers.schedule_batch", "attribute", VERIFYING, "penalties, seeds and stop tokens",
        *members(
            "Req",
            "origin_input_ids", "output_ids", "sampling_params", "eos_token_ids", "tokenizer",
            "is_retracted",
        ),
    ),
    *rows(
        "sampling.sampling_params", "attribute", VERIFYING, "penalties, seeds and stop tokens",
        *members(
            "SamplingParams",
            "sampling_seed", "frequency_penalty", "presence_penalty", "repetition_penalty",
            "min_new_tokens", "stop_token_ids",
        ),
    ),
    *rows(
        "sampling.sampling_batch_info", "attribute", VERIFYING, "sampling and penalties of a batch",
        *members(
            "SamplingBatchInfo",
            "temperatures", "top_ks", "top_ps", "min_ps", "need_top_k_sampling",
            "need_top_p_sampling", "need_min_p_sampling", "is_all_greedy", "logit_bias",
            "has_custom_logit_processor", "penalizer_orchestrator", "acc_additive_penalties",
            "acc_scaling_penalties",
        ),
    ),
    *rows(
        "sampling.penaltylib.orchestrator", "attribute", VERIFYING, "whether a batch has penalties",
        "BatchedPenalizerOrchestrator.is_required",
    ),
    *rows(
        "model_executor.forward_batch_info", "attribute", VERIFYING, "reads a pass",
        *members(
            "ForwardBatch",
            "forward_mode", "positions", "seq_lens", "req_pool_indices", "out_cache_loc",
            "sampling_info", "return_logprob", "input_embeds",
        ),
    ),
    *rows(
        "layers.logits_processor", "attribute", VERIFYING, "takes and injects the output",
        *members("LogitsProcessorOutput", "next_token_logits", "hidden_states"),
    ),
    *rows(
        WORKER, "attribute", VERIFYING, "accepts drafts of cut passes",
        "DFlashWorkerV2._use_triton_accept_bonus",
    ),
    *rows(
        WORKER, "attribute", VERIFYING, "gathers the logits of cut passes",
        "DFlashWorkerV2._target_logits_processor", since="0.5.23",
    ),
    *rows(
        "layers.logits_processor", "call", VERIFYING, "gathers the logits of cut passes",
        *members("LogitsProcessor", "is_deferred_shard", "finish_deferred_gather"),
        signature=("logits",), since="0.5.23",
    ),
    *rows(
        "sampling.sampling_batch_info", "attribute", VERIFYING, "verifies such batches whole",
        "SamplingBatchInfo.sampling_mask_batch_indices", since="0.5.20",
    ),
)  # fmt: skip
