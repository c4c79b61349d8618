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
        Each one's probability at temperature 1, given that the text is one of them.
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
    total = sum(sequences.values())
    return {tokens: probability / total for tokens, probability in sequences.items()}


def check_distribution(texts: Sequence[tuple[int, ...]], expected: Sequences) -> int:
    """Assert that samples fit the expected shares, and would not fit another temperature's.

    Returns:
        How many samples are among the expected sequences; only they are compared.
    """
    counts = {tokens: texts.count(tokens) for tokens in expected}
    total = sum(counts.values())

    def fit(shares: Sequences) -> float:
        """p of the counts; sequences expected less than five times are one class."""
        common = [tokens for tokens in shares if shares[tokens] * total >= 5]
        observed = [counts[tokens] for tokens in common]
        wanted = [shares[tokens] * total for tokens in common]
        if len(common) < len(shares):
            observed.append(total - sum(observed))
            wanted.append(total - sum(wanted))
        return float(chisquare(observed, wanted).pvalue)

    assert fit(expected) > 1e-3
    other = {tokens: share**2 for tokens, share in expected.items()}
    scale = sum(other.values())
    assert fit({tokens: share / scale for tokens, share in other.items()}) < 1e-4
    return total
