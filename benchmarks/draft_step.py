"""A whole draft step of a DFlash and a DFlash 2 drafter with the same layers, on CUDA.

    python benchmarks/draft_step.py --output FILE.json

A step embeds the blocks, runs the layers with attention over 512 positions of context each, and
takes drafts from the head as in the engines: the likeliest tokens, or a walk through a selector's
candidates. Shapes are those of a Qwen3-8B drafter in bfloat16. "convolutions" has those and takes
drafts as DFlash does, "selector" the other way round. Steps are replayed from CUDA graphs, in
turns; figures are medians in microseconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from kernels import (
    BLOCK,
    CANDIDATES,
    GROUP,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    RANK,
    REQUESTS,
    TAPS,
    VOCABULARY,
)
from torch import Tensor

from dflash_plugin.drafter.config import DrafterConfig, LayerAttention, RopeConfig, build_config
from dflash_plugin.drafter.model import Drafter

CONTEXT = 512
PARTS = {
    "convolution": {"kernel_size": TAPS, "group_size": GROUP},
    "selector": {"rank": RANK, "top_k": CANDIDATES},
}
KINDS = ("dflash", "convolutions", "selector", "dflash2", "dflash2_sampled")


class Unquantized:
    """An engine's method of a head that is not quantized."""


def drafter(parts: dict[str, Any]) -> Drafter:
    """With made-up weights, on the device."""
    config = DrafterConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        block_size=BLOCK,
        mask_token_id=0,
        target_layer_ids=(1, 9, 17, 25, 33),
        num_target_layers=36,
        target_hidden_size=HIDDEN,
        rope=RopeConfig(theta=1e6, max_position_embeddings=40960),
        layers=(LayerAttention(causal=False),) * LAYERS,
    )
    with torch.device("cuda"):
        made = Drafter(build_config({**config.model_dump(), **parts})).requires_grad_(False)
    for weight in made.parameters():
        weight.data = torch.randn_like(weight, dtype=torch.bfloat16) * 0.02
    made.rotary.to("cuda")
    return made


def step(
    made: Drafter, kind: str, batch: int, embedding: Tensor, head: Tensor
) -> Callable[[], Any]:
    """What is captured: a step of ``batch`` requests."""
    from dflash_plugin.kernels.draft_attention import PagedContext, draft_attention
    from dflash_plugin.kernels.fused_block import run_block
    from dflash_plugin.serving.draft_tokens import best_of_shard, candidates, select_drafts

    count = batch * CONTEXT
    caches = [
        torch.randn(2, count + 1, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for _ in range(LAYERS)
    ]
    slots = torch.randperm(count, device="cuda").view(batch, CONTEXT).int()
    lengths = torch.full((batch,), CONTEXT, device="cuda")
    positions = (lengths[:, None] + torch.arange(BLOCK, device="cuda")).flatten()
    tokens = torch.randint(VOCABULARY, (batch, BLOCK), device="cuda")
    drawing: tuple[Tensor, ...] = ()
    if kind == "dflash2_sampled":
        noise = torch.rand(batch, BLOCK - 1, dtype=torch.float64, device="cuda")
        drawing = (torch.full((batch,), 0.8, device="cuda"), noise)

    engine_head = SimpleNamespace(weight=head, quant_method=Unquantized())

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        block = [part.unflatten(0, (batch, BLOCK)) for part in (query, key, value)]
        paged = PagedContext(*caches[layer], slots, lengths)
        out = draft_attention(*block, paged, LayerAttention(causal=False), HEAD_DIM**-0.5)
        return out.flatten(0, 1)

    def run() -> Any:
        hidden = run_block(made, embedding[tokens.flatten()], positions, attend)
        rows = hidden.unflatten(0, (batch, BLOCK))[:, 1:].reshape(-1, HIDDEN)
        if made.candidate_selector is None:
            choice = best_of_shard(engine_head, rows, VOCABULARY, Unquantized)
            return rows.mm(head.T).argmax(dim=-1) if choice is None else choice.tokens
        found = candidates(
            made, engine_head, rows, VOCABULARY, Unquantized, lambda x: x.mm(head.T), None
        )
        return select_drafts(made, found, tokens[:, 0], *drawing)

    return run


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of it; every kernel is compiled before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """One replay; the weights are larger than any cache."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=101)
    arguments = parser.parse_args()
    embedding, head = (
        0.02 * torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="cuda")
        for _ in range(2)
    )
    whole, plain = drafter(PARTS), drafter({})
    # One part of a DFlash 2 drafter alone, which no checkpoint has.
    convolved, walked = drafter(PARTS), drafter(PARTS)
    convolved.candidate_selector = None
    for layer in walked.layers:
        layer.attention_conv = layer.mlp_conv = None
    made = dict(zip(KINDS, (plain, convolved, walked, whole, whole), strict=True))
    rows = []
    for batch in REQUESTS:
        graphs = {kind: captured(step(made[kind], kind, batch, embedding, head)) for kind in KINDS}
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.repeats):
            for kind, graph in graphs.items():
                times[kind].append(microseconds(graph))
        row = {kind: round(median(found), 1) for kind, found in times.items()}
        rows.append({"requests": batch, **row})
        print(rows[-1], flush=True)
        del graphs
    import triton

    record = {
        "command": f"python {' '.join(sys.argv)}",
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.date.today().isoformat(),
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
