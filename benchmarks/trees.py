"""Draft trees against the chain: τ, tokens/s, step times, and where the gain comes from.

    python benchmarks/trees.py --data tests/data --output FILE.json
    python benchmarks/trees.py --data tests/data --device cuda --batches 1,8 --output FILE.json

The Transformers engine answers the same prompts with the chain and with trees of several sizes, in
turns; figures are medians over the repeats, on a GPU after a run of each that captures graphs. The
chain of requests that sample is drawn. A step's time is that of a whole run, without that of its
prompts, over its steps.

Greedy, all write the same text. Sampled, each writes its own. So the expected τ of a drawn chain on
the texts of the largest tree in the first batch is added at the end, as
``benchmarks/draft_sampling.py`` computes it.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from draft_sampling import judge

from dflash_plugin.adaptive.tree_tokens import reached
from dflash_plugin.bench.evaluate import machine, pooled_tau
from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.decoding.sampling import SamplingParams
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers import Engine, Request, Result, load_drafter, load_target
from dflash_plugin.transformers.engine import generate_timed


def gains(results: list[Result], num_drafts: int) -> dict[str, int]:
    """What rows beside the chain gave, over the passes of all results.

    Args:
        results: of passes over trees.
        num_drafts: K.

    Returns:
        ``rejections``: passes that left the chain before its end; ``siblings``: those of them whose
        tree held the target's token; ``gained``: tokens committed beyond the chain's, the ones
        that follow these siblings; ``behind``: those of them that were rows of the tree.
    """
    paths = [path for result in results for path in result.accepted_rows]
    on_chain = [reached(path, num_drafts) for path in paths]
    left = [len(path) - chain for path, chain in zip(paths, on_chain, strict=True)]
    siblings = sum(beside > 0 for beside in left)
    return {
        "passes": len(paths),
        "rejections": sum(chain < num_drafts for chain in on_chain),
        "siblings": siblings,
        "gained": sum(left),
        "behind": sum(left) - siblings,
    }


def run(engine: Engine, drafter: Drafter, requests: list[Request]) -> tuple[list[Result], float]:
    """Answers, and seconds; the drafter serves several engines, each with its own store."""
    drafter.store = engine.store
    return generate_timed(engine, requests)


def compare(
    engines: dict[int, Engine], drafter: Drafter, requests: list[Request], repeats: int
) -> tuple[list[dict[str, Any]], list[Result]]:
    """One row for each number of tree rows, and what the largest trees wrote.

    Args:
        engines: by rows beside the chain, with 0 among them.
        drafter: of all of them.
        requests: what to answer.
        repeats: timed runs.
    """
    prompts = [Request(r.prompt, 1, r.stop_ids, r.sampling) for r in requests]
    for engine in engines.values():
        if engine.device.type == "cuda":
            run(engine, drafter, requests)
    first: dict[int, list[Result]] = {}
    seconds: dict[int, list[float]] = {rows: [] for rows in engines}
    of_prompts: dict[int, list[float]] = {rows: [] for rows in engines}
    steps = {}
    for _ in range(repeats):
        for rows, engine in engines.items():
            before = engine.steps
            results, took = run(engine, drafter, requests)
            seconds[rows].append(took)
            first.setdefault(rows, results)
            steps[rows] = engine.steps - before
            of_prompts[rows].append(run(engine, drafter, prompts)[1])
    chain = [result.tokens for result in first[0]]
    found = []
    for rows, results in first.items():
        took = median(seconds[rows])
        row = {
            "rows": rows,
            "tau": round(pooled_tau(results), 4),
            "tokens_per_second": round(sum(len(r.tokens) for r in results) / took, 2),
            "step_milliseconds": round(1e3 * (took - median(of_prompts[rows])) / steps[rows], 3),
            "steps": steps[rows],
            "seconds": [round(second, 4) for second in seconds[rows]],
            "same_text": sum(r.tokens == own for r, own in zip(results, chain, strict=True)),
        }
        found.append(row | (gains(results, engines[rows].num_drafts) if rows else {}))
    return found, first[max(engines)]


def main(
    data: Annotated[Path, typer.Option(help="Directory of the prompt sets.")],
    output: Annotated[Path, typer.Option()],
    target: str = "smollm2",
    drafter: Path | None = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 on a CPU, else bfloat16.")] = None,
    sets: str = "gsm8k_test,humaneval,mt_bench",
    prompts: Annotated[int, typer.Option(help="Of each set.")] = 4,
    new_tokens: int = 64,
    batches: Annotated[str, typer.Option(help="Requests at once.")] = "1,2,4,8",
    rows: Annotated[str, typer.Option(help="Beside the chain.")] = "8,16,32,48",
    temperatures: str = "0,0.8",
    repeats: int = 3,
) -> None:
    """Run every batch, temperature and number of rows; write one JSON file as they come."""
    kind = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    model, tokenizer = load_target(resolve_model(target), kind, device)
    loaded = load_drafter(resolve_drafter(drafter, target), model)
    chosen = [
        encode(tokenizer, prompt)
        for name in sets.split(",")
        for prompt in load_prompts(data / f"{name}.jsonl", prompts)
    ]
    length = max(map(len, chosen)) + new_tokens
    sizes = [0, *map(int, rows.split(","))]
    record = {
        "command": shlex.join(["python", *sys.argv]),
        **machine(model),
        "target": target,
        "prompts": len(chosen),
        "max_new_tokens": new_tokens,
        "num_drafts": loaded.config.num_draft_tokens,
        "repeats": repeats,
        "rows": [],
    }
    written: dict[float, list[list[int]]] = {}
    for batch in map(int, batches.split(",")):
        engines = {
            size: Engine(model, loaded, max_batch=batch, max_length=length, tree_rows=size)
            for size in sizes
        }
        for temperature in map(float, temperatures.split(",")):
            requests = [
                Request(prompt, new_tokens, sampling=SamplingParams(temperature, seed=seed))
                for seed, prompt in enumerate(chosen)
            ]
            found, results = compare(engines, loaded, requests, repeats)
            lines = [{"batch": batch, "temperature": temperature, **row} for row in found]
            record["rows"] += lines
            write(output, record)
            print(*lines, sep="\n", flush=True)
            if temperature:
                texts = zip(chosen, results, strict=True)
                written.setdefault(temperature, [prompt + r.tokens for prompt, r in texts])
    for temperature, texts in written.items():
        with torch.device(device):
            starts, params = [len(prompt) for prompt in chosen], {"temperature": temperature}
            taus = judge(loaded, model, texts, starts, params)["tau"]
        record.setdefault("chain_tau_on_trees_texts", {})[str(temperature)] = taus["probabilistic"]
        write(output, record)


def write(output: Path, record: dict[str, Any]) -> None:
    """Keep what has been measured so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
