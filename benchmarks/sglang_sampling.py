"""τ of requests that sample in SGLang, by how their drafts are made, on the same prompts.

    python benchmarks/sglang_sampling.py --output FILE.json

Every way has an engine of its own, one after the other. Texts are drawn anew by each, so that τ
differs by chance, and the more the fewer tokens are written.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from serving_common import Load, circumstances, real_prompts
from sglang_engine import served
from sglang_serving import arguments, speculative

from dflash_plugin.checkpoints.hub import resolve_model
from dflash_plugin.sglang.compat import installed

DRAFTS = 7


def measure(
    way: str, settings: dict[str, Any], drafter: Path, requests: list[dict[str, Any]], log: Path
) -> list[dict[str, Any]]:
    """Start an engine that makes drafts in one way, and answer."""
    engine = served(
        "plugin-fixed",
        settings,
        speculative(drafter, DRAFTS),
        log,
        DFLASH_PLUGIN_DRAFT_SAMPLING=way,
    )
    engine.wait()
    try:
        return [engine.ask(**request) for request in requests]
    finally:
        engine.close()


def main(
    output: Annotated[Path, typer.Option()],
    data: Path = Path("tests/data"),
    target: str = "smollm2",
    drafter: Path = Path("examples/smollm2-135m-dflash"),
    prompts: int = 40,
    new_tokens: int = 64,
    running: int = 8,
    temperatures: str = "0.6,1.0",
    ways: str = "greedy,probabilistic,auto",
) -> None:
    """Prompts of the five sets in turn; writes one JSON file and prints its rows."""
    directory = resolve_model(target)
    chosen = real_prompts(directory, data, prompts)
    load = Load(running, max(map(len, chosen)) + new_tokens, memory=None, is_dummy=False)
    settings = {**arguments(load), "model_path": str(directory), "dtype": "float32"}
    given = [float(temperature) for temperature in temperatures.split(",")]
    requests = [
        {
            "prompts": chosen,
            "concurrency": running,
            "sampling": {
                "temperature": temperature,
                "max_new_tokens": new_tokens,
                "ignore_eos": True,
            },
        }
        for temperature in given
    ]
    rows: list[dict[str, Any]] = []
    for way in ways.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(way, settings, drafter, requests, Path(folder) / "log")
        for temperature, answer in zip(given, found, strict=True):
            tokens = sum(map(len, answer["tokens"]))
            row = {"draft_sampling": way, "temperature": temperature, "tokens": tokens}
            rows.append({**row, "tau": round(answer["tau"], 4)})
            print(rows[-1], flush=True)
        record = {
            **circumstances("sglang", installed()),
            "drafter": drafter.name,
            "prompts": prompts,
            "max_new_tokens": new_tokens,
            "rows": rows,
        }
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
