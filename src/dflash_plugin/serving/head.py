"""The likeliest tokens under an engine's head, without logits where that is faster."""

from __future__ import annotations

from collections.abc import Callable
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


def choice_of_ranks(choice: HeadChoice, gather: Callable[[Tensor], Tensor]) -> HeadChoice:
    """The best token of each row over all ranks with its normaliser, the same bits on every rank.

    What is gathered is the same everywhere, also where hidden states differ in their last bits, and
    what is made of it has one order. Ranks may therefore decide by it what they run together.

    Args:
        choice: of this rank, one token a row, ids in the whole vocabulary.
        gather: puts every rank's int32 [T, 3] side by side.
    """
    parts = (
        choice.scores.view(torch.int32),
        choice.tokens.int(),
        choice.log_sum_exp[:, None].view(torch.int32),
    )
    ranks = gather(torch.cat(parts, dim=-1)).view(len(choice.tokens), -1, len(parts))
    scores, tokens, sums = ranks.unbind(dim=-1)
    scores = scores.view(torch.float32)
    best = scores.argmax(dim=-1, keepdim=True)
    score = scores.gather(-1, best)
    return choice._replace(
        tokens=tokens.gather(-1, best).long(),
        scores=score,
        logits=score,
        log_sum_exp=sums.view(torch.float32).logsumexp(dim=-1),
    )


def best_of_shard(head: Any, hidden: Tensor, rows: int, plain: type) -> HeadChoice | None:
    """The best token of each row over this rank's shard, or None where logits are to be made.

    A scale or soft-cap on logits keeps their order.

    Args:
        head: an engine's, with ``shard_indices`` where it is sharded.
        hidden: [T, hidden].
        rows: of its weight that are tokens.
        plain: the engine's method of heads that are not quantised.
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
        nothing = torch.full((count, 1), float("-inf"), device=hidden.device)
        tokens = torch.full((count, 1), first, device=hidden.device)
        return HeadChoice(tokens, nothing, nothing, nothing[:, 0])
    if not in_fp8:
        weight = head.weight[:rows]
        return draft_head(hidden.to(weight.dtype), weight, first_token=first)
    from dflash_plugin.kernels.quantise_rows import quantise_rows

    rounded, stored = quantise_rows(hidden), rows_of(head)
    return draft_head(
        rounded.values,
        stored.values[:rows],
        hidden_scale=rounded.scales,
        weight_scale=stored.scales[:rows],
        first_token=first,
    )
