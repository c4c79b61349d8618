"""The likeliest tokens under an engine's head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin import kernels
from dflash_plugin.fp8 import quantise
from dflash_plugin.serving import head as serving_head
from dflash_plugin.serving.fp8 import Fp8Method
from dflash_plugin.serving.head import best_of_shard, choice_of_ranks
from kernel_helpers import random

pytestmark = pytest.mark.usefixtures("kernel_device")


class Plain:
    """An engine's method of heads that are not quantised."""


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda device: True)


def head_of(weight: torch.Tensor, method: Any, start: int = 0) -> SimpleNamespace:
    shard = SimpleNamespace(org_vocab_start_index=start)
    return SimpleNamespace(weight=weight, quant_method=method, shard_indices=shard)


@pytest.mark.parametrize("fp8", [False, True])
def test_shards_find_the_best_of_the_whole(fp8):
    """Padding is left out, and a rank without tokens is asked like any other."""
    hidden, weight = random(5, 32), random(30, 32)
    best = []
    for start, rows in ((0, 20), (20, 10), (30, 0)):
        part = torch.cat([weight[start : start + rows], 100 * random(2, 32)])
        head = head_of(part, Plain(), start)
        if fp8:
            head.quant_method = Fp8Method()
            head.weight, head.fp8_scales = quantise(part)
        best.append(best_of_shard(head, hidden, rows, Plain))
    scores = torch.cat([one.scores for one in best], dim=-1)
    tokens = torch.cat([one.tokens for one in best], dim=-1)
    found = tokens.gather(-1, scores.argmax(dim=-1, keepdim=True))[:, 0]
    logits = hidden @ weight.T
    assert torch.equal(found, logits.argmax(dim=-1)) or fp8
    # Rounding changes places only of near ones.
    assert ((logits.max(dim=-1).values - logits[range(5), found]) < 0.5).all()
    sent: list[torch.Tensor] = []
    for one in best:
        choice_of_ranks(one, lambda part: sent.append(part) or part)
    merged = choice_of_ranks(best[-1], lambda _: torch.cat(sent, dim=-1))
    assert merged.tokens.tolist() == found[:, None].tolist()
    assert torch.equal(merged.logits, scores.max(dim=-1, keepdim=True).values)
    normaliser = logits.logsumexp(dim=-1)
    torch.testing.assert_close(merged.log_sum_exp, normaliser, atol=0.5 if fp8 else 1e-4, rtol=0)


def test_what_is_left_to_logits(monkeypatch):
    weight = random(30, 32)
    few, many = random(5, 32), random(serving_head.FEW_ROWS + 1, 32)
    assert best_of_shard(head_of(weight, Plain()), few, 30, Plain) is not None
    assert best_of_shard(head_of(weight, Plain()), many, 30, Plain) is None
    assert best_of_shard(head_of(weight, object()), few, 30, Plain) is None
    monkeypatch.setattr(kernels, "available", lambda device: False)
    assert best_of_shard(head_of(weight, Plain()), few, 30, Plain) is None
