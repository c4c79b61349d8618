"""Drafting and verifying requests that sample, with the core's noise and rejection rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dflash_plugin.decoding.sampling import SamplingTensors, probabilities
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream, uniforms
from dflash_plugin.sglang.penalties import to_device

SEEDS = "dflash_seeds"


class Noise:
    """Seeds of requests that gave none: new in every pass, the same on every rank.

    Args:
        seed: the server's.
        device: where batches live.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device = device

    def seeds(self, given: Tensor | None, batch: int) -> Tensor:
        """Seeds int64 [batch]; ``given`` holds the requests' own, -1 where they gave none."""
        drawn = torch.randint(
            0, 1 << 62, (batch,), generator=self.generator, device=self.device, dtype=torch.int64
        )
        return drawn if given is None else torch.where(given < 0, drawn, given)


def given_seeds(requests: Sequence[Any], device: torch.device) -> Tensor | None:
    """The requests' own seeds, int64 [B], -1 where one gave none; None where none did."""
    seeds = [request.sampling_params.sampling_seed for request in requests]
    if all(seed is None for seed in seeds):
        return None
    return to_device([-1 if seed is None else seed % (1 << 62) for seed in seeds], device)


def tensors(info: Any, seeds: Tensor) -> SamplingTensors:
    """The core's sampling parameters of SGLang's ``SamplingBatchInfo``; top-k of one is greedy."""
    greedy = info.top_ks <= 1
    return SamplingTensors(
        temperature=torch.where(greedy, 0.0, info.temperatures.view(-1).float()),
        top_k=info.top_ks.long(),
        top_p=info.top_ps.float(),
        min_p=info.min_ps.float(),
        seed=seeds,
    )


def distribution(logits: Tensor, params: SamplingTensors, info: Any) -> Tensor:
    """What tokens are drawn from, float32 [B, T, V]; sorts the vocabulary only where it must.

    Args:
        logits: [B, T, V].
        params: of the B requests.
        info: SGLang's ``SamplingBatchInfo``, whose flags the host knows.
    """
    if info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling:
        return probabilities(logits, params)
    # Without a top-k no request is greedy.
    return torch.softmax(logits.float() / params.temperature[:, None, None], dim=-1)


def draw(probs: Tensor, params: SamplingTensors, places: Tensor, stream: Stream) -> Tensor:
    """Tokens int64 [B, T] for absolute positions ``places`` [B, T], drawn from probs [B, T, V]."""
    return sample(probs, uniforms(params.seed, places, stream))
