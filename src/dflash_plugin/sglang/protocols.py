"""What this package reads, writes and calls of SGLang's objects, for the type checker.

``seams`` lists the same symbols by module and version, and checks them when a server starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor


class ForwardModeLike(Protocol):
    """``ForwardMode``: what kind of pass a batch runs."""

    def is_extend(self) -> bool:
        """Whether the batch prefills prompts."""
        ...

    def is_idle(self) -> bool:
        """Whether the batch is empty."""
        ...

    def is_target_verify(self) -> bool:
        """Whether the pass verifies blocks; draft passes are of this kind too."""
        ...


class RequestLike(Protocol):
    """``Req``."""

    origin_input_ids: Sequence[int]
    output_ids: Sequence[int]
    sampling_params: Any
    eos_token_ids: Any
    tokenizer: Any


class SamplingInfoLike(Protocol):
    """``SamplingBatchInfo``: sampling parameters of B requests."""

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor
    need_top_k_sampling: bool
    need_top_p_sampling: bool
    need_min_p_sampling: bool
    is_all_greedy: bool
    logit_bias: Tensor | None
    has_custom_logit_processor: bool
    penalizer_orchestrator: Any
    acc_additive_penalties: Tensor | None
    acc_scaling_penalties: Tensor | None


class ScheduleBatchLike(Protocol):
    """``ScheduleBatch``: the requests that a worker is given."""

    reqs: list[Any]
    decoding_reqs: list[Any] | None
    forward_mode: ForwardModeLike
    is_extend_in_batch: bool
    seq_lens: Tensor
    out_cache_loc: Tensor
    sampling_info: Any
    spec_info: Any
    return_logprob: bool
    has_grammar: bool


class ForwardBatchLike(Protocol):
    """``ForwardBatch``: the inputs of one pass of a model."""

    forward_mode: ForwardModeLike
    batch_size: int
    input_ids: Tensor
    positions: Tensor
    seq_lens: Tensor
    req_pool_indices: Tensor
    out_cache_loc: Tensor
    sampling_info: Any
    return_logprob: bool
    input_embeds: Tensor | None
    spec_info: Any


class LogitsOutputLike(Protocol):
    """``LogitsProcessorOutput``."""

    next_token_logits: Tensor | None
    hidden_states: Tensor | None


class AttnBackendLike(Protocol):
    """An attention back end, as far as ``block_attention`` and ``verify_graphs`` touch it."""

    forward_extend: Callable[..., Tensor]
    init_forward_metadata_out_graph: Callable[..., None]
    init_cuda_graph_state: Callable[..., None]
    supports_ragged_verify_graph: bool


class GraphRunnerLike(Protocol):
    """``DecodeCudaGraphRunner``: captured passes of one model.

    Attributes:
        capture_bs: numbers of requests that passes were captured for.
    """

    capture_bs: Sequence[int]
    backend: Any


class ModelRunnerLike(Protocol):
    """``ModelRunner``, of the target or of the drafter."""

    attn_backend: Any
    device: Any
    is_draft_worker: bool
    decode_cuda_graph_runner: Any
    init_new_workspace: bool
    server_args: Any
    model_config: Any
    kv_index_translator: Any
    req_to_token_pool: Any
    token_to_kv_pool: Any

    def _get_attention_backend(self, init_new_workspace: bool = False) -> Any: ...
