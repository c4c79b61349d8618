"""Greedy texts of an engine with the plugin against the target's own, in float32.

Run it where the engine is installed; the target alone is the Transformers engine's without a
drafter. ``--alone`` keeps its texts for the next engine:

    python benchmarks/greedy_texts.py --engine vllm --alone ALONE.json --output FILE.json

Programs that add in another order round apart, so a text may part where the target's two best
tokens are as good as equal: such places are counted as ties.
"""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from serving_common import EngineUnderTest, Load, circumstances, real_prompts
from target_alone import TIE, TargetAlone

from dflash_plugin.bench.evaluate import pooled_tau
from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
from dflash_plugin.transformers import Engine, Request, load_drafter


class Name(StrEnum):
    """The engines."""

    transformers = "transformers"
    vllm = "vllm"
    sglang = "sglang"


def of_transformers(
    alone: TargetAlone, drafter: Path, tokens: int, running: int
) -> tuple[list[list[int]], float]:
    """Texts and τ of the Transformers engine."""
    longest = max(map(len, alone.prompts)) + tokens
    engine = Engine(
        alone.model, load_drafter(drafter, alone.model), max_batch=running, max_length=longest
    )
    results = engine.generate([Request(prompt, tokens, stop_ids=()) for prompt in alone.prompts])
    return [result.tokens for result in results], pooled_tau(results)


def served_by(
    engine: EngineUnderTest,
    directory: Path,
    drafter: Path,
    prompts: list[list[int]],
    tokens: int,
    running: int,
    settings: dict[str, Any],
    log: Path,
) -> tuple[list[list[int]], float]:
    """Texts and τ of a serving engine."""
    load = Load(running, max(map(len, prompts)) + tokens, memory=None, is_dummy=False)
    arguments = {**engine.common(load), **engine.model(directory), "dtype": "float32", **settings}
    drafts = json.loads((drafter / "config.json").read_text())["block_size"] - 1
    child = engine.served("plugin", arguments, engine.speculative(drafter, drafts), log)
    try:
        child.wait()
        sampling = {**engine.sampling(tokens, False), "ignore_eos": True}
        found = child.ask(prompts=prompts, concurrency=running, sampling=sampling)
    finally:
        child.close()
    return found["tokens"], found["tau"]


def main(
    output: Annotated[Path, typer.Option()],
    engine: Annotated[Name, typer.Option()],
    alone: Path | None = None,
    target: str = "smollm2",
    drafter: Path | None = None,
    data: Path = Path("tests/data"),
    prompts: int = 1000,
    tokens: int = 64,
    running: int = 8,
    settings: str = "{}",
) -> None:
    """Compare and write one JSON file; the exit status is 1 if a text differs."""
    directory, weights = resolve_model(target), resolve_drafter(drafter, target)
    asked = real_prompts(directory, data, prompts)
    expected = TargetAlone(directory, asked, tokens, alone)
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if engine is Name.transformers:
        from dflash_plugin import __version__

        facts = circumstances("dflash-plugin", __version__)
        texts, tau = of_transformers(expected, weights, tokens, running)
    else:
        if engine is Name.vllm:
            from vllm_serving import VLLM as under_test
        else:
            from sglang_serving import SGLANG as under_test
        facts = circumstances(under_test.name, under_test.version())
        texts, tau = served_by(
            under_test,
            directory,
            weights,
            asked,
            tokens,
            running,
            json.loads(settings),
            output.with_suffix(".log"),
        )
    parted = [expected.compare(index, text) for index, text in enumerate(texts)]
    apart = [place for place in parted if place is not None]
    short = [index for index, text in enumerate(texts) if len(text) != tokens]
    record = {
        **facts,
        "engine": engine.value,
        "prompts": len({tuple(prompt) for prompt in asked}),
        "of": prompts,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "tau": round(tau, 3),
        "equal": prompts - len(apart),
        "ties": [place for place in apart if place["margin"] < TIE],
        "mismatches": [place for place in apart if place["margin"] >= TIE],
        "of_another_length": short,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(record, flush=True)
    sys.exit(1 if record["mismatches"] or short else 0)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
