"""The sampling parameters and distributions of SGLang's requests, for the core's sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_plugin.decoding.draft_sampling import sharpen
from dflash_plugin.decoding.sampling import SamplingTensors, probabilities
from dflash_plugin.kernels.draw_tokens import draw_tokens
from dflash_plugin.kernels.limited_softmax import limited_softmax
from dflash_plugin.kernels.select_path import Limits
from dflash_plugin.kernels.uniforms import Stream, uniforms
from dflash_plugin.sglang.penalties import to_device
from dflash_plugin.sglang.protocols import RequestLike, SamplingInfoLike

# Attribute of a prefill's SamplingBatchInfo: the result of ``given_seeds``.
SEEDS = "dflash_seeds"
# SGLang's top-k of requests that have none.
ALL_TOKENS = 1 << 30
# In place of a factor of zero, which puts all on the likeliest token.
SHARPEST = 1e-3


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


def given_seeds(requests: Sequence[RequestLike], device: torch.device) -> Tensor | None:
    """Seeds that the requests gave, int64 [B], with -1 for those that gave none; None if all."""
    seeds = [request.sampling_params.sampling_seed for request in requests]
    if all(seed is None for seed in seeds):
        return None
    return to_device([-1 if seed is None else seed % (1 << 62) for seed in seeds], device)


def kept_seeds(info: SamplingInfoLike) -> Tensor | None:
    """The seeds that our worker attached to a prefill's batch, or None."""
    seeds: Tensor | None = vars(info).get(SEEDS)
    return seeds


def tensors(info: SamplingInfoLike, seeds: Tensor) -> SamplingTensors:
    """The core's sampling parameters of SGLang's ``SamplingBatchInfo``; top-k of one is greedy."""
    greedy = info.top_ks <= 1
    return SamplingTensors(
        temperature=torch.where(greedy, 0.0, info.temperatures.view(-1).float()),
        top_k=torch.where(info.top_ks >= ALL_TOKENS, 0, info.top_ks).long(),
        top_p=info.top_ps.float(),
        min_p=info.min_ps.float(),
        seed=seeds,
    )


def distribution(
    logits: Tensor,
    params: SamplingTensors,
    info: SamplingInfoLike,
    factors: Tensor | None = None,
) -> Tensor:
    """The distributions that tokens are drawn from, float32 [B, T, V].

    Args:
        logits: [B, T, V].
        params: of the B requests.
        info: of the same batch; its flags are known to the host.
        factors: float32 [B, T], parts of the temperature (``decoding.draft_sampling``); None is 1
            everywhere.
    """
    if _is_limited(info):
        probs = probabilities(logits, params)
        return probs if factors is None else sharpen(probs, factors)
    # Without a top-k no request is greedy.
    temperature = params.temperature[:, None].expand(logits.shape[:2])
    if factors is not None:
        temperature = temperature * factors.clamp(min=SHARPEST)
    return limited_softmax(logits, temperature)


def limits(
    params: SamplingTensors, info: SamplingInfoLike, factors: Tensor | None = None
) -> Limits | None:
    """What a selector's walk draws within; None where it draws from its distribution as it is.

    Args:
        params: of the B requests.
        info: of the same batch.
        factors: float32 [B, K] or None, as for ``distribution``.
    """
    if factors is None and not _is_limited(info):
        return None
    return Limits(params.top_k, params.top_p, params.min_p, factors)


def _is_limited(info: SamplingInfoLike) -> bool:
    """Whether the batch has top-k, top-p or min-p; the host knows."""
    return info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling


def draw(probs: Tensor, params: SamplingTensors, positions: Tensor, stream: Stream) -> Tensor:
    """Tokens int64 [B, T] drawn from probs [B, T, V].

    Args:
        probs: float32 [B, T, V].
        params: of the B requests.
        positions: int64 [B, T], positions of the tokens in their texts.
        stream: what the tokens are drawn for.
    """
    return draw_tokens(probs, uniforms(params.seed, positions, stream))
