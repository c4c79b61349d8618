"""Transformers engine against PyPI dflash at batch 1, and its throughput by batch size.

Both run the same target and drafter weights on the same prompts in the same process, in turns;
figures are medians over the repeats. One file of results per call:

    python benchmarks/transformers_engine.py --data tests/data/gsm8k_test.jsonl --output FILE.json
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from dflash import model as dflash_model

from dflash_plugin.bench.evaluate import machine, pooled_tau
from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.prompts import encode, load_prompts
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What ``run`` returns, and its wall time in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Time each run ``repeats`` times, one after the other, after a warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    last: dict[str, Any] = {name: run() for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            last[name], took = timed(run)
            seconds[name].append(took)
    return {name: {"seconds": seconds[name], "result": last[name]} for name in runs}


def summary(
    name: str, batch: int, outcome: dict[str, Any], outputs: list[list[int]], tau: float
) -> dict[str, Any]:
    """One row of the results."""
    tokens = sum(len(output) for output in outputs)
    took = median(outcome["seconds"])
    return {
        "engine": name,
        "batch": batch,
        "requests": len(outputs),
        "tokens": tokens,
        "tau": round(tau, 4),
        "tokens_per_second": round(tokens / took, 2),
        "seconds": [round(second, 4) for second in outcome["seconds"]],
    }


def batch_one(model, drafter, reference, tokenizer, prompts, repeats, new_tokens):
    """PyPI dflash, this engine, and this engine without a drafter, one request at a time."""
    requests = [Request(encode(tokenizer, prompt), new_tokens) for prompt in prompts]
    length = max(len(request.prompt) for request in requests) + new_tokens
    ours = Engine(model, drafter, max_length=length)
    alone = Engine(model, None, max_length=length)
    stops = list(ours.stop_ids)

    def run_reference():
        return [
            dflash_model.dflash_generate(
                reference["drafter"],
                reference["target"],
                torch.as_tensor([list(request.prompt)], device=model.device),
                new_tokens,
                stops,
                return_stats=True,
            )
            for request in requests
        ]

    found = in_turns(
        {
            "dflash 0.1.0": run_reference,
            "dflash-plugin": lambda: [ours.generate([request])[0] for request in requests],
            "dflash-plugin, no drafter": lambda: [
                alone.generate([request])[0] for request in requests
            ],
        },
        repeats,
    )
    rows = []
    for name, outcome in found.items():
        results = outcome["result"]
        if name.startswith("dflash 0"):
            outputs = [r.output_ids[0, r.num_input_tokens :].tolist() for r in results]
            lengths = [length for r in results for length in r.acceptance_lengths]
            tau = sum(lengths) / len(lengths)
        else:
            outputs, tau = [r.tokens for r in results], pooled_tau(results)
        rows.append(summary(name, 1, outcome, outputs, tau))
        rows[-1]["outputs"] = outputs
    plain = rows[-1]["outputs"]
    for row in rows:
        same = zip(row.pop("outputs"), plain, strict=True)
        row["equal_to_plain"] = sum(one == other for one, other in same)
    return rows


def by_batch(model, drafter, tokenizer, prompts, repeats, new_tokens, sizes):
    """This engine with and without a drafter at several batch sizes."""
    rows = []
    for size in sizes:
        chosen = [prompts[i % len(prompts)] for i in range(max(4, 2 * size))]
        requests = [Request(encode(tokenizer, prompt), new_tokens) for prompt in chosen]
        length = max(len(request.prompt) for request in requests) + new_tokens
        engines = {
            "dflash-plugin": Engine(model, drafter, max_batch=size, max_length=length),
            "dflash-plugin, no drafter": Engine(model, None, max_batch=size, max_length=length),
        }
        runs = {name: partial(engine.generate, requests) for name, engine in engines.items()}
        for name, outcome in in_turns(runs, repeats).items():
            results = outcome["result"]
            rows.append(
                summary(name, size, outcome, [r.tokens for r in results], pooled_tau(results))
            )
    return rows


def main(
    data: Annotated[list[Path], typer.Option()],
    output: Annotated[Path, typer.Option()],
    target: str = "smollm2",
    drafter: Path | None = None,
    prompts: int = 4,
    repeats: int = 5,
    new_tokens: int = 256,
    batches: str = "1,2,4,8,16,32,64",
    dtype: str = "bfloat16",
) -> None:
    """Run both comparisons and write one JSON file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        dflash_model._cuda_time = time.perf_counter  # its statistics assume a GPU
    directory, weights = resolve_model(target), resolve_drafter(drafter, target)
    kind = getattr(torch, dtype)
    model, tokenizer = load_target(directory, kind, device)
    loaded = load_drafter(weights, model)
    # The engine installs its own attention in its model, so the reference gets a target of its own.
    reference = {
        "target": load_target(directory, kind, device)[0],
        "drafter": dflash_model.DFlashDraftModel.from_pretrained(weights, dtype=kind)
        .to(device)
        .eval(),
    }
    chosen = [prompt for path in data for prompt in load_prompts(path, prompts)]
    sizes = [int(size) for size in batches.split(",")]
    rows = batch_one(model, loaded, reference, tokenizer, chosen, repeats, new_tokens)
    rows += by_batch(model, loaded, tokenizer, chosen, repeats, new_tokens, sizes)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        **machine(model),
        "repeats": repeats,
        "max_new_tokens": new_tokens,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print({name: value for name, value in row.items() if name != "seconds"})


if __name__ == "__main__":
    typer.run(main)
