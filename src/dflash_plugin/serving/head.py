"""The likeliest tokens under an engine's head, without logits where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dflash_plugin import kernels
from dflash_plugin.serving.fp8 import Fp8Method, rows_of

if TYPE_CHECKING:
    from dflash_plugin.kernels.draft_head import HeadChoice

# Rows beyond which a library's product and an argmax are faster than draft_head.
FEW_ROWS = 128
FEW_ROWS_IN_FP8 = 512


def best_of_ranks(scores: Tensor, tokens: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """The best token int64 [T] over all ranks, of each rank's best.

    Args:
        scores: float32 [T, 1], of this rank's.
        tokens: int64 [T, 1], ids in the whole vocabulary.
        gather: puts every rank's [T, 1] side by side.
    """
    best = gather(scores).argmax(dim=-1, keepdim=True)
    return gather(tokens).gather(-1, best).squeeze(-1)


def best_of_shard(
    head: Any,
    hidden: Tensor,
    rows: int,
    plain: type,
    *,
    top_k: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
) -> HeadChoice | None:
    """The best tokens of each row over this rank's shard, or None where logits are to be made.

    A scale or soft-cap on logits keeps their order; a selector adds to what they make of them.

    Args:
        head: an engine's, with ``shard_indices`` where it is sharded.
        hidden: [T, hidden].
        rows: of its weight that are tokens.
        plain: the engine's method of heads that are not quantised.
        top_k: tokens of a row, from 1 to 16.
        scale: on logits.
        softcap: bends logits, or None.
    """
    method, count = getattr(head, "quant_method", None), hidden.shape[0]
    in_fp8 = isinstance(method, Fp8Method)
    if (
        not kernels.available(hidden.device)
        or not (in_fp8 or isinstance(method, plain))
        or count > (FEW_ROWS_IN_FP8 if in_fp8 else FEW_ROWS)
    ):
        return None
    from dflash_plugin.kernels.draft_head import HeadChoice, draft_head

    shard = getattr(head, "shard_indices", None)
    first = 0 if shard is None else int(shard.org_vocab_start_index)
    if rows == 0:  # All of a small head lies on other ranks, which ask for this one's best too.
        nothing = torch.full((count, top_k), float("-inf"), device=hidden.device)
        tokens = torch.full((count, top_k), first, device=hidden.device)
        return HeadChoice(tokens, nothing, nothing, nothing[:, 0])
    wanted = partial(draft_head, first_token=first, top_k=top_k, scale=scale, softcap=softcap)
    if not in_fp8:
        weight = head.weight[:rows]
        return wanted(hidden.to(weight.dtype), weight)
    from dflash_plugin.kernels.quantise_rows import quantise_rows

    rounded, stored = quantise_rows(hidden), rows_of(head)
    return wanted(
        rounded.values,
        stored.values[:rows],
        hidden_scale=rounded.scales,
        weight_scale=stored.scales[:rows],
    )
