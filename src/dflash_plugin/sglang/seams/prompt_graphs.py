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
)  # fmt: skip
