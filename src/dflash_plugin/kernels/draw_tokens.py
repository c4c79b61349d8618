"""Tokens that are drawn from distributions, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.language import tl, triton
from dflash_plugin.kernels.next_token import draw_next
from dflash_plugin.kernels.reference import sample


@triton.jit
def _kernel(probs, noise, tokens_out, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    u = tl.load(noise + row).to(tl.float64)
    none = row < 0
    token = draw_next(
        probs + row * vocabulary, None, None, row * 0 - 1, 1.0, none, u, vocabulary, 0, BLOCK
    )
    tl.store(tokens_out + row, token)


@with_twin
def draw_tokens(probs: Tensor, u: Tensor) -> Tensor:
    """Draw by inverse CDF; a token of probability zero is never drawn.

    Args:
        probs: float32 [..., V], contiguous, not necessarily normalized; a row has at least one
            entry above zero.
        u: [...] in [0, 1), contiguous.

    Returns:
        int64 [...].

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(probs, u)
    tokens = torch.empty(u.shape, dtype=torch.int64, device=probs.device)
    if tokens.numel():
        _kernel[(tokens.numel(),)](probs, u, tokens, probs.shape[-1], BLOCK=4096, num_warps=8)
    return tokens


def _check(probs: Tensor, u: Tensor) -> None:
    if probs.dtype != torch.float32 or not probs.is_contiguous():
        raise ValueError("probs must be contiguous float32 [..., V]")
    if u.shape != probs.shape[:-1] or not u.is_contiguous():
        raise ValueError(f"u must be contiguous {list(probs.shape[:-1])}")


def draw_tokens_naive(probs: Tensor, u: Tensor) -> Tensor:
    """``draw_tokens`` in plain torch."""
    _check(probs, u)
    return sample(probs, u)
