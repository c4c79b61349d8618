"""Compare policies of how many drafts to verify, on recorded traces and given step times.

    python benchmarks/budget_simulator.py --output benchmarks/results/budget-simulator.json

Step times are straight lines through ``--verify`` (tokens:milliseconds) and ``--draft``
(requests:milliseconds), at the sizes that an engine would capture. The defaults are the plugin's
steps of Qwen3-8B's shape in ``benchmarks/results/sglang-h100-timelines.json``.
"""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from dflash_plugin.adaptive.simulation.simulate import compare
from dflash_plugin.adaptive.simulation.traces import Traces
from dflash_plugin.adaptive.step_cost import StepCost, interpolated


def points(text: str) -> dict[int, float]:
    """ "16:6.8,1024:22.9" as seconds by size."""
    pairs = (item.split(":") for item in text.split(","))
    return {int(size): float(milliseconds) / 1e3 for size, milliseconds in pairs}


def sizes(largest: int) -> list[int]:
    """Sizes up to ``largest``, closer together where passes are small."""
    found, size = [1, 2, 4, 8], 8
    while size < largest:
        size += 8 if size < 64 else 16 if size < 512 else 64
        found.append(size)
    return found


def main(
    output: Annotated[Path, typer.Option()],
    traces: Path = Path("benchmarks/results/traces-smollm2.safetensors"),
    verify: str = "16:6.8,1024:22.9",
    draft: str = "1:0.9,64:3.1",
    fixed: float = 0.5,
    requests: str = "1,4,8,16,32,64,128,256",
    seeds: int = 4,
) -> None:
    """Write one JSON file and print a table."""
    recorded = Traces.load(traces)
    levels = [int(level) for level in requests.split(",")]
    largest = max(levels)
    cost = StepCost.measured(
        interpolated(points(verify), sizes(largest * (recorded.num_drafts + 1))),
        interpolated(points(draft), sizes(largest)),
        fixed / 1e3,
    )
    torch.set_num_threads(1)
    found = compare(recorded, cost, levels, seeds)
    rows = []
    for level, runs in found.items():
        fixed_runs = {name: run for name, run in runs.items() if name.startswith("fixed")}
        best = max(fixed_runs, key=lambda name: fixed_runs[name].rate)
        rows.append(
            {
                "requests": level,
                "best_fixed": best,
                "against_best_fixed": round(runs["adaptive"].rate / runs[best].rate, 4),
                "against_oracle": round(runs["adaptive"].rate / runs["oracle"].rate, 4),
                "tokens_per_second": {name: round(run.rate, 1) for name, run in runs.items()},
                "adaptive": asdict(runs["adaptive"]),
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "adaptive"}, flush=True)
    mixed = [
        {
            "requests": level,
            "policy": name,
            **{
                half: round(2 * tokens / run.seconds / level, 1)
                for half, tokens in (
                    ("easy", run.easy_tokens),
                    ("hard", run.tokens - run.easy_tokens),
                )
            },
        }
        for level, runs in compare(recorded, cost, [8, 32, 64, 128], seeds, mixed=True).items()
        for name, run in runs.items()
    ]
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "texts": len(recorded.starts) - 1,
        "positions": len(recorded.right),
        "tau": round(recorded.tau, 3),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
        "mixed": mixed,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
