"""Record what a drafter drafts at every position of its target's greedy texts.

    python tools/record_traces.py --output benchmarks/results/traces-smollm2.safetensors

The budget simulator (``benchmarks/budget_simulator.py``) replays them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from serving_common import SETS

from dflash_plugin.adaptive.simulation.traces import record
from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.prompts import load_prompts
from dflash_plugin.train.data import respond
from dflash_plugin.train.features import OnlineFeatures, known_texts
from dflash_plugin.transformers import Engine, load_drafter, load_target


def main(
    output: Annotated[Path, typer.Option()],
    target: str = "smollm2",
    drafter: Path | None = None,
    data: Path = Path("tests/data"),
    limit: int = 10,
    new_tokens: int = 256,
    batch: int = 16,
) -> None:
    """Take ``--limit`` prompts of each of the five sets."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_target(resolve_model(target), torch.float32, device)
    drafting = load_drafter(resolve_drafter(drafter, target), model)
    prompts = [one for name in SETS for one in load_prompts(data / f"{name}.jsonl")[:limit]]
    engine = Engine(model, drafting, max_batch=batch, max_length=1024)
    sequences = respond(engine, tokenizer, prompts, new_tokens)
    features = OnlineFeatures(model, drafting.config.target_layer_ids)
    traces = record(drafting, known_texts(features, sequences, model.device))
    traces.save(output)
    print(f"{len(traces.starts) - 1} texts, {len(traces.right)} positions, τ {traces.tau:.3f}")


if __name__ == "__main__":
    typer.run(main)
