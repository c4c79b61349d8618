"""Adaptive verification on two tensor-parallel ranks: nothing that shapes a pass differs."""

from __future__ import annotations

import itertools
import random
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed, multiprocessing

from dflash_plugin.kernels.best_logits import best_logits_naive
from dflash_plugin.serving.adaptive_setup import VerifyBudget
from dflash_plugin.serving.draft_tokens import choice_of_ranks
from dflash_plugin.serving.drafter_spec import Options
from dflash_plugin.serving.ranks import agree_across_ranks, any_across_ranks
from dflash_plugin.sglang import adaptive
from dflash_plugin.sglang.adaptive import MIN_FREE, AdaptiveVerifier

RANKS, STEPS, BATCH, BLOCK = 2, 240, 3, 5
HIDDEN, VOCABULARY = 16, 50
# The first rank's tokens; the second has the rest.
SPLIT = 34


def gather(part: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(RANKS)]
    distributed.all_gather(parts, part)
    return torch.cat(parts, dim=-1)


def serve(rank: int, folder: Path) -> None:
    """In a process: what one rank drafts, verifies and learns."""
    meet = f"file://{folder}/meet"
    distributed.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(rank)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=common)
    first, rows = ((0, SPLIT), (SPLIT, VOCABULARY - SPLIT))[rank]
    drawn = random.Random(rank)
    clock = itertools.accumulate(10 ** drawn.uniform(-1, 1) for _ in itertools.count())
    adaptive.time = SimpleNamespace(monotonic=lambda: next(clock))
    group = SimpleNamespace(world_size=RANKS, ranks=[0, 1], cpu_group=distributed.group.WORLD)
    agree, wanted = agree_across_ranks(group), []
    assert agree is not None

    def noted(chosen: int) -> int:
        wanted.append(chosen)
        return agree(chosen)

    device = torch.device("cpu")
    budget = VerifyBudget(Options(), BLOCK - 1, BATCH, device, agree=noted)
    verifier = AdaptiveVerifier(budget, BLOCK, BATCH, device)
    worker: Any = SimpleNamespace(
        target_worker=SimpleNamespace(
            model_runner=SimpleNamespace(attn_backend=None, decode_cuda_graph_runner=None)
        )
    )
    made: dict[str, list[Any]] = {name: [] for name in ("same", "alone", "whole")}
    for _ in range(STEPS):
        hidden = torch.randn(BATCH * (BLOCK - 1), HIDDEN, generator=common)
        # As sums of other orders would leave it.
        seen = hidden + 1e-6 * torch.randn(hidden.shape, generator=own)
        shard = best_logits_naive(seen @ weight[first : first + rows].T, 1)
        shard = shard._replace(tokens=shard.tokens + first)
        choice = choice_of_ranks(shard, gather)
        verifier.predictor.predict(choice.logits[:, 0], choice.log_sum_exp)
        committed = torch.randint(1, BLOCK, (BATCH,), dtype=torch.int32, generator=common)
        batch = SimpleNamespace(
            reqs=[None] * BATCH, return_logprob=False, has_grammar=False, sampling_info=None
        )
        with verifier.verifying(worker, batch):
            tokens, counts = torch.arange(BATCH * BLOCK), [BLOCK] * BATCH
            if verifier.num_rows is not None:
                tokens = verifier.compact(tokens, tokens, tokens).tokens
                counts = verifier.row_counts()
            verifier.learn(torch.minimum(committed, torch.tensor(counts)).int())
        predictor = verifier.predictor
        same = [
            *choice,
            tokens,
            torch.tensor(counts),
            predictor.predictions,
            *predictor.model.state,
        ]
        made["same"].append([part.clone() for part in same])
        made["alone"].append(best_logits_naive(seen @ weight.T, 1))
        made["whole"].append(best_logits_naive(hidden @ weight.T, 1))
    started = [start(rank, short, group) for short in (0, 1, None)]
    torch.save(
        {**made, "wanted": wanted, "counts": budget.policy.counts(), "started": started},
        folder / f"{rank}.pt",
    )
    distributed.destroy_process_group()


def start(rank: int, short: int | None, group: Any) -> tuple[int, bool, bool]:
    """What one rank decides at start, unasked, where one of both is ``short`` of memory."""
    # By this rank's clock alone batches of two, or of four, would be verified whole.
    limit = (2, 4)[rank]
    adaptive.graph_seconds = lambda graphs, device: {
        size: 1.0 if size <= limit else 2.0 for size in (1, 2, 4, 8)
    }
    adaptive.free_memory = lambda device: MIN_FREE / 2 if rank == short else 2.0 * MIN_FREE
    device = torch.device("cpu")
    budget = VerifyBudget(Options(), BLOCK - 1, BATCH, device, agree=agree_across_ranks(group))
    verifier = AdaptiveVerifier(
        budget, BLOCK, BATCH, device, is_optional=True, on_any_rank=any_across_ranks(group)
    )
    captured: list[Any] = []

    def capture(*asked: Any) -> list[int]:
        captured.append(asked)
        return []

    verifier.graphs.capture = capture
    runner: Any = SimpleNamespace(
        attn_backend=None, decode_cuda_graph_runner=SimpleNamespace(capture_bs=[1, 2, 4, 8])
    )
    verifier.measure(runner)
    verifier.capture(runner, runner)
    return verifier.bypass, verifier.whole_blocks, bool(captured)


def test_two_ranks_verify_the_same_bit_by_bit(tmp_path):
    """Their clocks differ, and so do the last bits of what their drafters give."""
    multiprocessing.spawn(serve, (tmp_path,), nprocs=RANKS)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS))
    for left, right in zip(one["same"], two["same"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    for merged, whole in zip(one["same"], one["whole"], strict=True):
        assert torch.equal(merged[0], whole.tokens)
        for found, expected in zip(merged[1:3], whole[1:], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # Each by itself would have gone its own way.
    assert any(
        not torch.equal(a.log_sum_exp, b.log_sum_exp)
        for a, b in zip(one["alone"], two["alone"], strict=True)
    )
    assert len(one["wanted"]) == len(two["wanted"])
    assert one["wanted"] != two["wanted"]
    assert one["counts"] == two["counts"]
    # Small batches are bypassed alike, and memory that one lacks turns it off on both.
    assert (
        one["started"] == two["started"] == [(2, True, False), (2, True, False), (2, False, True)]
    )
    assert sum(n > 0 for name, n in one["counts"].items() if name.startswith("steps:")) > 2
