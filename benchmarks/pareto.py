"""Tokens per second of one user against those of the whole GPU, native beside the plugin.

    python benchmarks/pareto.py --output docs/pareto-qwen3-8b.svg RESULT.json ...

Each result is one of ``vllm_serving.py`` or ``sglang_serving.py``; a line joins an engine's numbers
of requests at once. Needs matplotlib: ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from table import NAMES

matplotlib.use("svg")
# The same file from the same results.
matplotlib.rcParams["svg.hashsalt"] = "dflash-plugin"

from matplotlib import pyplot  # noqa: E402

COLOURS = {"vllm": "tab:blue", "sglang": "tab:orange"}


def main(results: list[Path], output: Annotated[Path, typer.Option()]) -> None:
    """Draw every result's engines into one picture."""
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for path in results:
        record = json.loads(path.read_text())
        serving = next(name for name in COLOURS if name in record["versions"])
        for engine in dict.fromkeys(row["engine"] for row in record["rows"]):
            rows = [row for row in record["rows"] if row["engine"] == engine]
            points = sorted(
                (row["tokens_per_second"] / row["concurrency"], row["tokens_per_second"])
                for row in rows
            )
            label = f"{serving} {record['versions'][serving]}, {NAMES[engine]}"
            style = "o--" if engine == "native" else "o-" if "adaptive" in engine else "o:"
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[serving], label=label)
            for row in rows:
                place = row["tokens_per_second"] / row["concurrency"], row["tokens_per_second"]
                axes.annotate(
                    str(row["concurrency"]), place, (4, 4), textcoords="offset points", fontsize=8
                )
    axes.set_xlabel("tokens/s of one user (numbers at the points: requests at once)")
    axes.set_ylabel("tokens/s of the GPU")
    axes.set_title(f"{record['device']}, Qwen3-8B's shape, replayed acceptance")
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(output, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
