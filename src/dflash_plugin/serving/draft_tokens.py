"""Draft tokens under an engine's head, without materialized logits where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin import kernels
from dflash_plugin.decoding.sampling import block_seeds
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.kernels.best_logits import best_logits
from dflash_plugin.kernels.draft_head import draft_head
from dflash_plugin.kernels.quantize_rows import quantize_rows
from dflash_plugin.kernels.select_path import (
    MAX_CANDIDATES,
    Limits,
    Path,
    select_path,
    select_path_naive,
)
from dflash_plugin.kernels.uniforms import Stream, uniforms
from dflash_plugin.kernels.vocab_topk import MAX_TOP_K, HeadChoice
from dflash_plugin.serving.fp8_weights import Fp8Method, rows_of

# With more rows, a library's product and an argmax are faster than draft_head.
FEW_ROWS = 128
FEW_ROWS_IN_FP8 = 512


class Candidates(NamedTuple):
    """What a selector chooses among, for T rows that draft.

    Attributes:
        tokens: int64 [T, C], the likeliest tokens, ids of the target.
        logits: float32 [T, C], with the drafter's scale and soft-cap.
        gates: [T, R], the selector's projection of the rows.
    """

    tokens: Tensor
    logits: Tensor
    gates: Tensor

    def first(self, rows: int) -> Candidates:
        """The candidates of the first ``rows`` rows."""
        return Candidates(*(part[:rows] for part in self))


def _beside(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Run a small computation on a second stream, beside what is launched on the current one.

    The second stream owns the result's memory; it waits for the current stream before it starts, so
    that the memory is not reused too early.

    Args:
        run: makes the result.
        device: where it runs; on a CPU it runs at once.

    Returns:
        A function that makes the current stream wait and gives the result.
    """
    if device.type != "cuda":
        made = run()
        return lambda: made
    own, other = torch.cuda.current_stream(device), _second_stream(device)
    other.wait_stream(own)
    with torch.cuda.stream(other):
        made = run()

    def result() -> Tensor:
        own.wait_stream(other)
        return made

    return result


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def first_token(head: Any) -> int:
    """The token id of the first row of a rank's head; 0 where the head is not sharded.

    Args:
        head: an engine's, with ``shard_indices`` where it is sharded.
    """
    shard = getattr(head, "shard_indices", None)
    return 0 if shard is None else int(shard.org_vocab_start_index)


def shard_rows(head: Any, whole: int) -> int:
    """Rows of a rank's head that are tokens of the target, without padding.

    A drafter's own head may have more rows than the target has tokens.

    Args:
        head: an engine's, with ``shard_indices`` where it is sharded.
        whole: tokens of the target; the answer for a head that is not sharded.
    """
    shard = getattr(head, "shard_indices", None)
    if shard is None:
        return whole
    rest = whole - int(shard.org_vocab_start_index)
    return max(0, min(int(shard.num_org_elements), rest))


def best_of_ranks(scores: Tensor, tokens: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """The best token int64 [T] over all ranks.

    Args:
        scores: float32 [T, 1], logit of this rank's best token.
        tokens: int64 [T, 1], this rank's best token, an id in the whole vocabulary.
        gather: puts every rank's float32 [T, 2] side by side, [T, 2 * ranks].
    """
    # One gather, of numbers of one kind: an engine's may not take int64.
    both = torch.cat([scores, tokens.to(torch.int32).view(torch.float32)], dim=-1)
    scores, ids = gather(both).unflatten(-1, (-1, 2)).unbind(-1)
    best = scores.argmax(dim=-1, keepdim=True)
    found: Tensor = ids.contiguous().view(torch.int32).gather(-1, best).squeeze(-1).long()
    return found


def choice_of_ranks(choice: HeadChoice, gather: Callable[[Tensor], Tensor]) -> HeadChoice:
    """The best token of each row over all ranks with its normalizer, the same bits on every rank.

    Every rank gathers the same numbers, even where hidden states differ in their last bits between
    ranks, and reduces them in the same order. Ranks may therefore decide by the result what they
    run together.

    Args:
        choice: this rank's, one token a row, ids in the whole vocabulary.
        gather: puts every rank's int32 [T, 3] side by side, [T, ranks * 3].
    """
    parts = (
        choice.logits.view(torch.int32),
        choice.tokens.int(),
        choice.log_sum_exp[:, None].view(torch.int32),
    )
    ranks = gather(torch.cat(parts, dim=-1)).view(len(choice.tokens), -1, len(parts))
    logits, tokens, sums = ranks.unbind(dim=-1)
    logits = logits.view(torch.float32)
    best = logits.argmax(dim=-1, keepdim=True)
    return choice._replace(
        tokens=tokens.gather(-1, best).long(),
        logits=logits.gather(-1, best),
        log_sum_exp=sums.view(torch.float32).logsumexp(dim=-1),
    )


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

    Scale and soft-cap keep the order of logits, so that only a selector needs them: it adds to the
    logits.

    Args:
        head: an engine's, with ``shard_indices`` where it is sharded.
        hidden: [T, hidden].
        rows: rows of the head's weight that are tokens.
        plain: the engine's method of heads that are not quantized.
        top_k: tokens of a row, from 1 to 16.
        scale: factor on logits.
        softcap: bound c of logits, as c * tanh(logit / c); None for no bound.
    """
    method, count = getattr(head, "quant_method", None), hidden.shape[0]
    in_fp8 = isinstance(method, Fp8Method)
    if (
        not kernels.available(hidden.device)
        or not (in_fp8 or isinstance(method, plain))
        or count > (FEW_ROWS_IN_FP8 if in_fp8 else FEW_ROWS)
    ):
        return None
    if top_k > MAX_TOP_K or 0 < rows < top_k:
        return None
    first = first_token(head)
    if rows == 0:  # All of a small head lies on other ranks, which ask for this one's best too.
        nothing = torch.full((count, top_k), float("-inf"), device=hidden.device)
        tokens = torch.full((count, top_k), first, device=hidden.device)
        return HeadChoice(tokens, nothing, nothing[:, 0])
    wanted = partial(draft_head, first_token=first, top_k=top_k, scale=scale, softcap=softcap)
    if not in_fp8:
        weight = head.weight[:rows]
        return wanted(hidden.to(weight.dtype), weight)
    rounded, stored = quantize_rows(hidden), rows_of(head)
    return wanted(
        rounded.values,
        stored.values[:rows],
        hidden_scale=rounded.scales,
        weight_scale=stored.scales[:rows],
    )


def candidates(
    drafter: Drafter,
    head: Any,
    hidden: Tensor,
    rows: int,
    plain: type,
    make_logits: Callable[[Tensor], Tensor],
    gather: Callable[[Tensor], Tensor] | None,
) -> Candidates:
    """The C likeliest tokens of each row over all ranks, for the drafter's selector.

    Args:
        drafter: with a selector of C candidates.
        head: an engine's, with ``shard_indices`` where it is sharded.
        hidden: [T, hidden].
        rows: rows of this rank's head that are tokens.
        plain: the engine's method of heads that are not quantized.
        make_logits: gives this rank's logits [T, rows] of ``hidden``, neither scaled nor bounded.
        gather: puts every rank's float32 [T, 2 * C] side by side; None where there is one rank.
    """
    selector = drafter.candidate_selector
    assert selector is not None
    top_k, config = selector.top_k, drafter.config
    scale, softcap = config.logit_scale, config.logit_softcap
    gates = _beside(partial(selector.hidden_projection, hidden), hidden.device)
    choice = best_of_shard(head, hidden, rows, plain, top_k=top_k, scale=scale, softcap=softcap)
    if choice is not None:
        tokens, logits = choice.tokens, choice.logits
    else:
        tokens, logits = _best_of_logits(drafter, make_logits(hidden), top_k, first_token(head))
    if gather is not None:
        # One gather for both: token ids travel as the bits of floats.
        both = torch.cat([logits, tokens.to(torch.int32).view(torch.float32)], dim=-1)
        all_logits, all_tokens = gather(both).unflatten(-1, (-1, 2, top_k)).unbind(-2)
        best = all_logits.flatten(1).topk(top_k, dim=-1)
        all_tokens = all_tokens.flatten(1).contiguous().view(torch.int32)
        tokens, logits = all_tokens.gather(-1, best.indices).long(), best.values
    return Candidates(tokens, logits, gates())


def _best_of_logits(
    drafter: Drafter, logits: Tensor, top_k: int, first: int
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` best token ids and their logits, both [T, top_k], of a shard's [T, rows].

    Args:
        drafter: gives scale and soft-cap.
        logits: of this rank's rows.
        top_k: tokens of a row.
        first: token id of the shard's first row.
    """
    # Without kernels, torch's topk is faster than the twin, which sorts.
    if kernels.available(logits.device) and top_k <= min(MAX_TOP_K, logits.shape[1]):
        scale, softcap = drafter.config.logit_scale, drafter.config.logit_softcap
        best = best_logits(logits, top_k, first_token=first, scale=scale, softcap=softcap)
        return best.tokens, best.logits
    # A shard may have fewer tokens than candidates; the other ranks have the rest.
    missing = max(0, top_k - logits.shape[1])
    values = F.pad(drafter.scale_logits(logits.float()), (0, missing), value=float("-inf"))
    ranked = values.topk(top_k, dim=-1)
    return ranked.indices + first, ranked.values


def select_drafts(
    drafter: Drafter,
    found: Candidates,
    anchors: Tensor,
    temperature: Tensor | None = None,
    u: Tensor | None = None,
    limits: Limits | None = None,
) -> Path:
    """Drafts of B blocks along the selector's path, with what they were drawn from.

    Args:
        drafter: with a selector.
        found: candidates of the B * K rows that draft.
        anchors: int64 [B], anchor tokens.
        temperature: float32 [B], blocks at 0 take the best candidate; None takes it in all blocks.
        u: [B, K] in [0, 1), the noise of draws; goes with ``temperature``.
        limits: of what is drawn from; None draws from all candidates.
    """
    selector = drafter.candidate_selector
    assert selector is not None
    tokens, logits, gates = (part.unflatten(0, (len(anchors), -1)) for part in found)
    codebooks = selector.predecessor_codebook, selector.successor_codebook
    select = select_path if selector.top_k <= MAX_CANDIDATES else select_path_naive
    return select(tokens, logits, gates, anchors, *codebooks, temperature, u, limits)


def block_noise(seed: Tensor, anchors: Tensor, drafts: int) -> Tensor:
    """The noise of drafts, float64 [B, K] in [0, 1), new for every block of a request.

    All drafts of a block decide how far it is accepted, and those of a selector how many drafts of
    later blocks are verified. A position that is drafted again must therefore be drawn anew.

    Args:
        seed: int64 [B], of the requests.
        anchors: int64 [B], positions of the blocks' anchors.
        drafts: K, drafts of a block.
    """
    positions = anchors[:, None] + torch.arange(1, drafts + 1, device=anchors.device)
    return uniforms(block_seeds(seed, anchors), positions, Stream.DRAFT)
