"""Sampling that does not depend on the batch: probabilities, counter-based noise, inverse CDF."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.limited_softmax import TokenLimits, limited_softmax

# SGLang takes lower temperatures for greedy, too; divided by them, logits would overflow.
GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are drawn from the target.

    Attributes:
        temperature: below ``GREEDY_BELOW`` is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one; 0 keeps all.
        seed: makes the request's tokens repeatable in any batch; None draws a random one.

    Raises:
        DFlashError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise DFlashError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0:
            raise DFlashError(f"top_k is {self.top_k}: give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise DFlashError(f"top_p is {self.top_p}: give more than 0 and at most 1 (off)")
        if not 0 <= self.min_p < 1:
            raise DFlashError(f"min_p is {self.min_p}: give at least 0 (off) and less than 1")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise DFlashError(f"seed is {self.seed}: give a whole number from 0 to 2**63 - 1")


class SamplingTensors(NamedTuple):
    """Sampling parameters of a batch, each [B]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor

    @classmethod
    def build(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingTensors:
        """Parameters of B requests on a device; a request without a seed gets a random one.

        The temperature of a greedy request is 0.
        """
        seeds = [secrets.randbits(62) if p.seed is None else p.seed for p in params]
        temperatures = [0.0 if p.temperature < GREEDY_BELOW else p.temperature for p in params]
        return cls(
            torch.tensor(temperatures, dtype=torch.float32, device=device),
            torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            torch.tensor(seeds, dtype=torch.int64, device=device),
        )

    def of_rows(self, requests: Tensor) -> SamplingTensors:
        """Those of rows [N], each one's request given."""
        return SamplingTensors(*(part[requests] for part in self))


def is_limited(params: Iterable[SamplingParams]) -> bool:
    """Whether a request's tokens are limited by top-k, top-p or min-p."""
    return any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params)


def probabilities(logits: Tensor, params: SamplingTensors, limited: bool = True) -> Tensor:
    """The distribution that tokens are drawn from.

    Temperature, then top-k, then top-p, then min-p, each on what the one before left (Hugging
    Face's order). Tokens tied with the k-th are kept; top-p keeps a token while the probability of
    those before it is below top_p. Greedy rows put all on the first largest logit. Penalties are
    the target's: its processors have been applied to ``logits``.

    Args:
        logits: [B, T, V].
        params: of the B requests.
        limited: False where no request has top-k, top-p or min-p, which saves looking for them.

    Returns:
        float32 [B, T, V], each row summing to one.
    """
    temperature = params.temperature[:, None].expand(logits.shape[:2])
    limits = TokenLimits(params.top_k, params.top_p, params.min_p) if limited else None
    return limited_softmax(logits, temperature, limits)


def block_seeds(seed: Tensor, anchors: Tensor) -> Tensor:
    """Seeds int64 [B] of the noise of one block, new for every block of a request.

    Args:
        seed: int64 [B], of the requests.
        anchors: int64 [B], positions of the blocks' anchors.
    """
    return seed ^ (anchors << 32)
