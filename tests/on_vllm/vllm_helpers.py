"""Starting engines and looking into them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chisquare

Sequences = dict[tuple[int, ...], float]

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
BLOCK = 32


@contextmanager
def running(target: Path, drafter: Path | None, **settings: Any) -> Iterator[Any]:
    """A float32 engine; without a drafter, the target alone."""
    from vllm import LLM

    speculative = settings.pop("speculative", {})
    if drafter is not None:
        speculative = {"method": "dflash", "model": str(drafter), **speculative}
    engine = LLM(
        str(target),
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_num_seqs": 8,
            "max_model_len": 512,
            "disable_log_stats": False,
            "speculative_config": speculative or None,
            **settings,
        },
    )
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def on_worker(engine: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(worker, *args)`` on the engine's first worker."""
    return engine.collective_rpc(function, args=args)[0]


def counter(engine: Any, name: str) -> Any:
    """One of vLLM's metrics."""
    found = {metric.name: metric for metric in engine.get_metrics()}[name]
    return getattr(found, "values", None) or found.value


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


def check_distribution(completions: list[Any], expected: Sequences) -> int:
    """Assert that samples fit the expected shares, and would not fit another temperature's.

    Returns:
        How many samples are among the expected sequences; only they are compared.
    """
    texts = [tuple(completion.token_ids) for completion in completions]
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
