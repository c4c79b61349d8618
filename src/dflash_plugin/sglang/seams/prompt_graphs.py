"""CUDA graphs of whole passes that read prompts."""

from __future__ import annotations

from dflash_plugin.sglang.seams.features import PROMPT_GRAPHS
from dflash_plugin.sglang.seams.rows import members, rows

ROWS = (
    *rows(
        "runtime_context", "call", PROMPT_GRAPHS, "reads and changes what is captured",
        "get_exec", signature=(),
    ),
    *rows(
        "model_executor.cuda_graph_config", "attribute", PROMPT_GRAPHS,
        "reads and changes what is captured",
        *members("PhaseConfig", "backend", "full_prefill_max_req"),
        *members("Backend", "FULL", "BREAKABLE"),
    ),
    *rows(
        "model_executor.runner.prefill_cuda_graph_runner", "patch", PROMPT_GRAPHS,
        "lets captured passes share the memory of their output",
        "PrefillCudaGraphRunner._run_forward", signature=("forward_batch", "num_tokens"),
        until="0.5.22",
    ),
    *rows(
        "model_executor.runner.prefill_cuda_graph_runner", "attribute", PROMPT_GRAPHS,
        "tells the passes that are captured whole, and their largest",
        *members("PrefillCudaGraphRunner", "_is_full_backend", "max_num_tokens"), until="0.5.22",
    ),
    *rows(
        "layers.attention.flashattention_backend", "call", PROMPT_GRAPHS,
        "has the metadata of such graphs",
        "FlashAttentionBackend._init_full_cg_prefill_metadata",
        signature=("forward_batch", "in_capture"),
    ),
    *rows(
        "layers.attention.flashattention_backend", "attribute", PROMPT_GRAPHS,
        "tells which targets it was measured with",
        "FlashAttentionBackend.use_sliding_window_kv_pool",
    ),
    *rows(
        "mem_cache.memory_pool", "attribute", PROMPT_GRAPHS,
        "tells whether passes without a graph have memory",
        "KVCache.post_capture_active",
    ),
)  # fmt: skip
