"""Whether sampled text has the target's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import chisquare

Sequences = dict[tuple[int, ...], float]


@torch.inference_mode()
def continuations(target: Any, prompt: list[int], length: int, best: int, cut: bool) -> Sequences:
    """Continuations of ``length`` tokens, each among the ``best`` likeliest of its step.

    Args:
        cut: whether sampling is cut to these tokens too.

    Returns:
        Each one's probability at temperature 1; together one if sampling is cut to them.
    """
    sequences: Sequences = {(): 1.0}
    for _ in range(length):
        longer: Sequences = {}
        for tokens, probability in sequences.items():
            ids = torch.tensor([prompt + list(tokens)])
            logits = target(input_ids=ids, use_cache=False).logits[0, -1]
            top = logits.topk(best)
            shares = torch.softmax(top.values if cut else logits, -1)
            shares = shares if cut else shares[top.indices]
            for token, share in zip(top.indices, shares, strict=True):
                longer[(*tokens, int(token))] = probability * float(share)
        sequences = longer
    return sequences


def check_distribution(texts: Sequence[tuple[int, ...]], expected: Sequences) -> int:
    """Assert that samples fit the expected shares, and would not fit another temperature's.

    Args:
        texts: the samples.
        expected: shares of some or all of the possible texts.

    Returns:
        How many samples are among the expected ones; the others are compared as one class.
    """
    counts = {tokens: texts.count(tokens) for tokens in expected}
    total, known = len(texts), sum(counts.values())

    def fit(shares: Sequences) -> float:
        """p of the counts; texts expected less than five times are with the others."""
        common = [tokens for tokens in shares if shares[tokens] * total >= 5]
        observed = [counts[tokens] for tokens in common]
        wanted = [shares[tokens] * total for tokens in common]
        if total - sum(wanted) > 1e-3:
            observed.append(total - sum(observed))
            wanted.append(total - sum(wanted))
        scale = total / sum(wanted)
        return float(chisquare(observed, [number * scale for number in wanted]).pvalue)

    assert fit(expected) > 1e-3
    other = {tokens: share**2 for tokens, share in expected.items()}
    scale = sum(expected.values()) / sum(other.values())
    assert fit({tokens: share * scale for tokens, share in other.items()}) < 1e-4
    return known
