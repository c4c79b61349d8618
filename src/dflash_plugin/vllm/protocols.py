"""The parts of vLLM's objects that the adapter uses, for the type checker.

``surface.SEAMS`` lists the same names; ``tests/contracts`` checks them against vLLM's source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int32]


class SpeculativeConfig(Protocol):
    """Settings of the speculative method."""

    draft_model_config: Any
    draft_sample_method: str
    rejection_sample_method: str
    enable_adaptive_verification: bool
    num_speculative_tokens_per_batch_size: Any
    num_speculative_tokens: int


class ParallelConfig(Protocol):
    """How many ranks share the model, and how many copies of it there are."""

    tensor_parallel_size: int
    data_parallel_size: int


class VllmConfig(Protocol):
    """The engine's configuration."""

    model_config: Any
    speculative_config: SpeculativeConfig
    parallel_config: ParallelConfig
    compilation_config: Any
    cache_config: Any
    lora_config: Any
    aux_output_config: Any
    kv_transfer_config: Any
    use_v2_model_runner: bool


class AttentionGroup(Protocol):
    """The V2 runner's attention layers of one kind in a group of the KV cache."""

    backend: type[Any]
    kv_cache_spec: Any

    def get_metadata_builder(self, ubatch_id: int, /) -> Any:
        """What builds the layers' metadata, and tells which graphs hold them."""


class GraphManager(Protocol):
    """The V2 runner's CUDA graphs of a model."""

    vllm_config: Any
    cudagraph_mode: Any
    max_num_reqs: int
    # The passes to capture by how they are, from the longest down, and for each number of tokens
    # and of adapters those that hold it, the preferred ones first.
    _capture_descs: dict[Any, list[Any]]
    _candidates: dict[tuple[int, int], list[Any]]


class RequestState(Protocol):
    """The V2 runner's requests."""

    num_speculative_steps: int
    max_num_reqs: int
    device: torch.device


class InputBatch(Protocol):
    """The V2 runner's batch of a step."""

    req_ids: Sequence[str]
    idx_mapping: Tensor


class Speculator(Protocol):
    """The V2 runner's speculator, laid out for whole blocks."""

    vllm_config: Any
    device: torch.device
    max_num_reqs: int
    sample_from_anchor: bool
    sample_col: Tensor
    draft_tokens: Tensor
    query_cudagraph_manager: Any
    # Added by the plugin; an attribute, so that vLLM frees its graphs as it does all others.
    short_cudagraph_manager: Any


class StepTimingSample(Protocol):
    """What one profiled step took."""

    forward_ms: float
    drafter_ms: float
    num_target_tokens: int
    num_reqs: int
    full_cudagraph: bool


class UvaBackedTensor(Protocol):
    """Values of the V2 runner's request slots, on the host and as the device reads them."""

    np: NDArray[Any]
    gpu: Tensor


class SamplingStates(Protocol):
    """Sampling parameters of the V2 runner's request slots; off are a top-k of all tokens and a
    top-p of 1."""

    top_k: UvaBackedTensor
    top_p: UvaBackedTensor


class AdaptiveVerificationManager(Protocol):
    """vLLM's own choice of drafts."""

    # Draft and other tokens by request, and the number of drafts that the step verifies.
    _batch_budget: tuple[Mapping[str, int], Mapping[str, int], int] | None

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """Arguments of the steps that are profiled at start."""

    def compact_batch(
        self, num_draft_tokens_per_req: Counts, num_scheduled_tokens: Counts, starts: Counts, /
    ) -> tuple[Counts, Counts]:
        """The host's view of the batch."""


class AcceptanceEstimator(Protocol):
    """vLLM's estimate of acceptance probabilities, learned online."""

    REFIT_INTERVAL: int
    slope: Tensor
    intercepts: Tensor
    features: Tensor
    predictions: Tensor

    def step(self, idx_mapping: Tensor, num_sampled: Tensor, num_rejected: Tensor, /) -> None:
        """Learn from the outcome of a step."""


class KVCacheSpec(Protocol):
    """A kind of cache, of one layer or of a group's layers."""

    page_size_bytes: int
    # None, too, where a kind with attention has no window.
    sliding_window: int | None

    def max_memory_usage_bytes(self, vllm_config: Any, /) -> int:
        """Bytes of a request of the greatest length."""

    def merge(self, specs: list[Any], /) -> Any:
        """The kind of all ``specs``; fails where they differ too much."""


class KVCacheGroup(Protocol):
    """Layers that share block tables."""

    layer_names: list[str]
    kv_cache_spec: KVCacheSpec


class KVCacheConfig(Protocol):
    """Groups of the paged cache."""

    num_blocks: int
    kv_cache_groups: Sequence[KVCacheGroup]


class SamplingMetadata(Protocol):
    """Sampling parameters of a V1 batch."""

    all_greedy: bool
    temperature: Tensor
    # None where no request of the batch has it.
    top_k: Tensor | None
    top_p: Tensor | None


class SpecDecodingStats(Protocol):
    """Acceptance of one step."""

    num_drafts: int
    num_accepted_tokens_per_pos: Sequence[int]


class SchedulerStats(Protocol):
    """A step's statistics on the way to the API server."""


class EngineCoreOutputs(Protocol):
    """What one step sends to one API server."""

    __struct_fields__: tuple[str, ...]
    scheduler_stats: SchedulerStats | None


class Worker(Protocol):
    """A worker process."""

    vllm_config: VllmConfig


Method = Callable[..., Any]
