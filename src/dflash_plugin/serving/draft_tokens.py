"""The likeliest tokens under an engine's head, without logits where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_plugin import kernels
from dflash_plugin.decoding.sampling import Stream, uniforms
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.serving.fp8_weights import Fp8Method, rows_of

if TYPE_CHECKING:
    from dflash_plugin.drafter.selector import Proposal
    from dflash_plugin.kernels.draft_head import HeadChoice
    from dflash_plugin.kernels.select_path import Path

# Rows beyond which a library's product and an argmax are faster than draft_head.
FEW_ROWS = 128
FEW_ROWS_IN_FP8 = 512


class Candidates(NamedTuple):
    """What a selector chooses among, of rows that draft.

    Attributes:
        tokens: int64 [T, C], the likeliest, ids of the target.
        logits: float32 [T, C], scaled and bent.
        gates: [T, R], the selector's projection of the rows.
    """

    tokens: Tensor
    logits: Tensor
    gates: Tensor

    def first(self, rows: int) -> Candidates:
        """Those of so many rows."""
        return Candidates(*(part[:rows] for part in self))


def _beside(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Start what takes little of a GPU beside what is launched until its result is asked for.

    The result's memory is the second stream's, which waits for the first before it is used again.
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
    """The id of the first token of a rank's shard; 0 where the head is whole.

    Args:
        head: an engine's, with ``shard_indices`` where it is sharded.
    """
    shard = getattr(head, "shard_indices", None)
    return 0 if shard is None else int(shard.org_vocab_start_index)


def shard_rows(head: Any, whole: int) -> int:
    """Rows of a rank's shard that are tokens; ``whole`` where the head is not sharded.

    Args:
        head: an engine's, with ``shard_indices`` where it is sharded.
        whole: rows of a head that is not.
    """
    shard = getattr(head, "shard_indices", None)
    return whole if shard is None else int(shard.num_org_elements)


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
    """The best token of each row over all ranks with its normalizer, the same bits on every rank.

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
        plain: the engine's method of heads that are not quantized.
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
    from dflash_plugin.kernels.draft_head import MAX_TOP_K, HeadChoice, draft_head

    if top_k > MAX_TOP_K or 0 < rows < top_k:
        return None
    first = first_token(head)
    if rows == 0:  # All of a small head lies on other ranks, which ask for this one's best too.
        nothing = torch.full((count, top_k), float("-inf"), device=hidden.device)
        tokens = torch.full((count, top_k), first, device=hidden.device)
        return HeadChoice(tokens, nothing, nothing, nothing[:, 0])
    wanted = partial(draft_head, first_token=first, top_k=top_k, scale=scale, softcap=softcap)
    if not in_fp8:
        weight = head.weight[:rows]
        return wanted(hidden.to(weight.dtype), weight)
    from dflash_plugin.kernels.quantize_rows import quantize_rows

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
    """The likeliest tokens of each row over all ranks, as many as the drafter's selector has.

    Args:
        drafter: with a selector.
        head: an engine's, with ``shard_indices`` where it is sharded.
        hidden: [T, hidden].
        rows: of this rank's shard of the head that are tokens.
        plain: the engine's method of heads that are not quantized.
        make_logits: this rank's [T, rows] of ``hidden``, as the head gives them.
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
        # Once for both, as numbers of one kind.
        both = torch.cat([logits, tokens.to(torch.int32).view(torch.float32)], dim=-1)
        all_logits, all_tokens = gather(both).unflatten(-1, (-1, 2, top_k)).unbind(-2)
        best = all_logits.flatten(1).topk(top_k, dim=-1)
        all_tokens = all_tokens.flatten(1).contiguous().view(torch.int32)
        tokens, logits = all_tokens.gather(-1, best.indices).long(), best.values
    return Candidates(tokens, logits, gates())


def _best_of_logits(
    drafter: Drafter, logits: Tensor, top_k: int, first: int
) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a shard."""
    if kernels.available(logits.device):
        from dflash_plugin.kernels.best_logits import best_logits
        from dflash_plugin.kernels.draft_head import MAX_TOP_K

        if top_k <= min(MAX_TOP_K, logits.shape[1]):
            scale, softcap = drafter.config.logit_scale, drafter.config.logit_softcap
            best = best_logits(logits, top_k, first_token=first, scale=scale, softcap=softcap)
            return best.tokens, best.logits
    # Other ranks have what a small shard lacks.
    missing = max(0, top_k - logits.shape[1])
    values = F.pad(drafter.scale_logits(logits.float()), (0, missing), value=float("-inf"))
    ranked = values.topk(top_k, dim=-1)
    return ranked.indices + first, ranked.values


def walk(
    drafter: Drafter,
    found: Candidates,
    anchors: Tensor,
    temperature: Tensor | None = None,
    u: Tensor | None = None,
) -> Path | Proposal:
    """Drafts of B blocks along the selector's path, with what they were drawn from.

    Args:
        drafter: with a selector.
        found: of the B * K rows that predict.
        anchors: int64 [B], the blocks' anchors.
        temperature: float32 [B], rows at 0 take the best; None takes it everywhere.
        u: [B, K] in [0, 1), the noise of draws; goes with ``temperature``.
    """
    selector = drafter.candidate_selector
    assert selector is not None
    tokens, logits, gates = (part.unflatten(0, (len(anchors), -1)) for part in found)
    if kernels.available(gates.device):
        from dflash_plugin.kernels.select_path import MAX_CANDIDATES, select_path

        if selector.top_k <= MAX_CANDIDATES:
            codebooks = selector.predecessor_codebook, selector.successor_codebook
            return select_path(tokens, logits, gates, anchors, *codebooks, temperature, u)
    return selector.path(tokens, logits, gates, anchors, temperature, u)


def noise(seed: Tensor, position: Tensor) -> Tensor:
    """The noise of drafts, float64 [B, K] in [0, 1), one launch where kernels run.

    Args:
        seed: int64 [B].
        position: int64 [B, K], of the drafts.
    """
    if kernels.available(seed.device):
        from dflash_plugin.kernels.uniforms import uniforms as launched

        return launched(seed.contiguous(), position.contiguous(), Stream.DRAFT)
    return uniforms(seed, position, Stream.DRAFT)


def noise_of_walks(seed: Tensor, anchors: Tensor, drafts: int) -> Tensor:
    """The noise of selectors' drafts, float64 [B, K], new for every block.

    What a path promises depends on what was drawn, and so does how much of later blocks is
    verified. A position that is drafted again must therefore be drawn anew.

    Args:
        seed: int64 [B].
        anchors: int64 [B], positions of the blocks' anchors.
        drafts: K.
    """
    places = anchors[:, None] + torch.arange(1, drafts + 1, device=anchors.device)
    return noise(seed ^ (anchors << 32), places)
