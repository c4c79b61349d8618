"""The likeliest tokens under an engine's head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_plugin import kernels
from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors
from dflash_plugin.kernels.best_logits import best_logits
from dflash_plugin.kernels.draft_head import draft_head, draft_head_naive
from dflash_plugin.kernels.fp8_rows import quantize
from dflash_plugin.serving import draft_tokens as serving_head
from dflash_plugin.serving.draft_tokens import (
    Candidates,
    best_of_shard,
    block_noise,
    candidates,
    choice_of_ranks,
    select_drafts,
)
from dflash_plugin.serving.fp8_weights import Fp8Method
from tests.helpers.kernel_helpers import DEVICE, integers, random
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("kernel_device")


class Plain:
    """An engine's method of heads that are not quantized."""


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
            head.weight, head.fp8_scales = quantize(part)
        best.append(best_of_shard(head, hidden, rows, Plain))
    scores = torch.cat([one.logits for one in best], dim=-1)
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
    normalizer = logits.logsumexp(dim=-1)
    torch.testing.assert_close(merged.log_sum_exp, normalizer, atol=0.5 if fp8 else 1e-4, rtol=0)


@pytest.mark.parametrize("fp8", [False, True])
def test_shards_find_the_candidates_of_the_whole(fp8):
    hidden, weight = random(5, 32), random(40, 32)
    options = {"top_k": 4, "scale": 0.5, "softcap": 3.0}
    parts = []
    for start, rows in ((0, 25), (25, 15), (40, 0)):
        head = head_of(weight[start : start + rows], Plain(), start)
        if fp8:
            head.quant_method = Fp8Method()
            head.weight, head.fp8_scales = quantize(head.weight)
        parts.append(best_of_shard(head, hidden, rows, Plain, **options))
    tokens, logits = (torch.cat([part[i] for part in parts], dim=-1) for i in range(2))
    best = logits.topk(4, dim=-1)
    whole = draft_head_naive(hidden, weight, **options)
    assert torch.equal(tokens.gather(-1, best.indices), whole.tokens) or fp8
    torch.testing.assert_close(best.values, whole.logits, atol=0.2 if fp8 else 1e-5, rtol=0)


@pytest.mark.parametrize("by", ["draft_head", "best_logits", "torch"])
@pytest.mark.parametrize("shards", [1, 3])
def test_candidates_and_path_are_the_cores(monkeypatch, by, shards):
    """However the head is shared out; one rank has fewer tokens than there are candidates."""
    drafter = tiny_drafter(tiny_target(), logit_scale=0.5, logit_softcap=4.0, **DFLASH2)
    drafter = drafter.to(DEVICE).requires_grad_(False)
    hidden, anchors = random(2, 3, 32), torch.tensor([5, 90], device=DEVICE)
    weight, positions = drafter.head().weight, torch.zeros_like(anchors)
    expected = drafter.propose(hidden, anchors, positions)
    rows = hidden.flatten(0, 1)
    if by == "torch":
        monkeypatch.setattr(kernels, "available", lambda device: False)
    method = Plain() if by == "draft_head" else object()

    def rank(start: int, count: int, gather: Any) -> Candidates:
        part = weight[start : start + count]
        head = head_of(part, method, start)
        return candidates(drafter, head, rows, count, Plain, lambda x: x @ part.T, gather)

    if shards == 1:
        found = rank(0, 97, None)
    else:
        parts = [rank(start, count, None) for start, count in ((0, 60), (60, 34), (94, 3))]
        kinds = (lambda part: part.logits, lambda part: part.tokens.int().view(torch.float32))
        gathered = torch.cat([kind(part) for part in parts for kind in kinds], dim=-1)
        found = rank(0, 60, lambda _: gathered)
    path = select_drafts(drafter, found, anchors)
    assert torch.equal(path.tokens, expected.tokens)
    torch.testing.assert_close(path.scores, expected.scores)
    torch.testing.assert_close(path.confidence, expected.confidence)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("by", ["draft_head", "best_logits"])
def test_the_walk_is_the_cores(by: str, sampled: bool) -> None:
    drafter = tiny_drafter(tiny_target(), logit_scale=0.5, logit_softcap=4.0, **DFLASH2).to(DEVICE)
    hidden, anchors, positions = random(2, 3, 32), integers(0, 97, 2), integers(0, 90, 2)
    rows = hidden.flatten(0, 1)
    sampling = temperature = u = None
    if sampled:
        params = [SamplingParams(0.8, seed=5), SamplingParams()]
        sampling = SamplingTensors.build(params, DEVICE)
        temperature = sampling.temperature
        u = block_noise(sampling.seed, positions, 3)
    head = drafter.head()
    with torch.no_grad():
        with kernels.forced(False):
            expected = drafter.propose(hidden, anchors, positions, sampling)
        if by == "draft_head":
            best = draft_head(rows, head.weight, top_k=5, scale=0.5, softcap=4.0)
        else:
            best = best_logits(head(rows), 5, scale=0.5, softcap=4.0)
        gates = drafter.candidate_selector.hidden_projection(rows)
        found = Candidates(best.tokens, best.logits, gates)
        out = select_drafts(drafter, found, anchors, temperature, u)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.scores, expected.scores)
    torch.testing.assert_close(out.confidence, expected.confidence)
    if sampled:
        torch.testing.assert_close(out.probs, expected.probs)


def test_a_position_that_is_drafted_again_is_drawn_anew():
    """By its request's seed, and differently from every block."""
    seeds, anchors = torch.tensor([5, 5, 6], device=DEVICE), torch.tensor([9, 10, 9], device=DEVICE)
    found = block_noise(seeds, anchors, 3)
    assert torch.equal(found, block_noise(seeds, anchors, 3))
    assert found.shape == (3, 3)
    assert found.unique().numel() == 9


def test_what_is_left_to_logits(monkeypatch):
    weight = random(30, 32)
    few, many = random(5, 32), random(serving_head.FEW_ROWS + 1, 32)
    assert best_of_shard(head_of(weight, Plain()), few, 30, Plain) is not None
    assert best_of_shard(head_of(weight, Plain()), many, 30, Plain) is None
    assert best_of_shard(head_of(weight, object()), few, 30, Plain) is None
    monkeypatch.setattr(kernels, "available", lambda device: False)
    assert best_of_shard(head_of(weight, Plain()), few, 30, Plain) is None
