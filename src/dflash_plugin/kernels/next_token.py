"""What kernels that accept drawn drafts share: a draft's probability, and the token behind them."""

from __future__ import annotations

from dflash_plugin.kernels.language import tl, triton


@triton.jit
def proposed(
    draft_probs,
    candidates,
    row,
    token,
    mask,
    vocabulary,
    CANDIDATES: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
):
    """Probabilities float64 that tokens were drawn with, one for each row of ``draft_probs``."""
    if candidates is None:
        q = tl.load(draft_probs + row * vocabulary + token, mask=mask, other=1.0)
    else:
        candidate = tl.arange(0, BLOCK_CANDIDATES)
        at = row[:, None] * CANDIDATES + candidate[None, :]
        known = mask[:, None] & (candidate < CANDIDATES)[None, :]
        here = tl.load(candidates + at, mask=known, other=-1) == token[:, None]
        q = tl.load(draft_probs + at, mask=known, other=0.0)
        q = tl.sum(tl.where(here, q, 0.0), axis=1)
    return q.to(tl.float64)


@triton.jit
def weights(at, inside, target, draft, tokens, excluded, scale, usable, COUNT: tl.constexpr):
    """What tokens are drawn in proportion to: the residual where a draft was rejected."""
    value = tl.load(target + at, mask=inside, other=0.0)
    if draft is not None:
        if tokens is None:
            taken = tl.load(draft + at, mask=inside, other=0.0)
        else:
            taken = value * 0.0
            for candidate in range(COUNT):
                here = at == tl.load(tokens + candidate)
                taken += tl.where(here, tl.load(draft + candidate), 0.0)
        left = tl.maximum(scale * value - taken, 0.0)
    else:
        left = tl.where(at == excluded, 0.0, value)
    return tl.where(usable, left, value)


@triton.jit
def draw_next(
    target,
    draft,
    tokens,
    excluded,
    scale,
    usable,
    u,
    vocabulary,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token int64 behind the accepted drafts.

    Args:
        target: at the target's float32 [V] there.
        draft: at the float32 [V] that the rejected draft was drawn from, or [COUNT] of ``tokens``;
            None where it was chosen.
        tokens: at the int64 [COUNT] that ``draft`` is of; None where it is of the vocabulary.
        excluded: the rejected draft, where it was chosen.
        scale: float32, what the residual multiplies the target's probabilities by.
        usable: whether a draft was rejected.
        u: float64 in [0, 1).
        vocabulary: V.
    """
    total = tl.zeros((), dtype=tl.float64)
    left = tl.zeros((), dtype=tl.float64)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        whole = tl.load(target + at, mask=inside, other=0.0)
        total += tl.sum(whole.to(tl.float64), axis=0)
        part = weights(at, inside, target, draft, tokens, excluded, scale, usable, COUNT)
        left += tl.sum(part.to(tl.float64), axis=0)
    # Rounding can leave nothing where p and q are equal; then a rejection cannot matter.
    usable = usable & (left > 0)
    threshold = u * tl.where(usable, left, total)
    reached = tl.zeros((), dtype=tl.float64)
    found = vocabulary
    last = 0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        part = weights(at, inside, target, draft, tokens, excluded, scale, usable, COUNT)
        part = part.to(tl.float64)
        cumulative = reached + tl.cumsum(part, axis=0)
        over = (cumulative > threshold) & (part > 0)
        found = tl.minimum(found, tl.min(tl.where(over, at, vocabulary), axis=0))
        last = tl.maximum(last, tl.max(tl.where(part > 0, at, 0), axis=0))
        reached += tl.sum(part, axis=0)
    return tl.where(found < vocabulary, found, last).to(tl.int64)
