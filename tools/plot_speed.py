"""Draw output tokens/s by requests in flight: native as it comes and at its best, and the plugin.

    python tools/plot_speed.py     writes docs/speed-qwen3-8b.svg from the results

One panel an engine that ``FAIR`` in tools/tables/fair.py names a result of. Needs matplotlib:
``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.tables.common import ROOT, measured, runs_of
from tools.tables.fair import FAIR, PLOT, fastest, rows_by_level

matplotlib.use("svg")
# The same results give the same file.
matplotlib.rcParams["svg.hashsalt"] = "dflash-plugin"

from matplotlib import pyplot  # noqa: E402

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
BARS = ("native as it comes", "native at its best setting", "plugin as it comes")
COLORS = ("tab:gray", "tab:blue", "tab:orange")


def bar_heights(cells: dict[str, dict]) -> list[tuple[float, float, float]]:
    """Median, lowest and highest tokens/s of every bar; zeros where a mode was not measured."""
    modes = ("native", fastest(cells, "native"), "plugin")
    rows = [cells.get(mode) for mode in modes]
    return [
        (row["tokens_per_second"], min(row["all"]), max(row["all"])) if row else (0.0, 0.0, 0.0)
        for row in rows
    ]


def main() -> None:
    engines = [engine for engine, name in FAIR.items() if measured(name)]
    if not engines:
        sys.exit(f"nothing to draw: benchmarks/results has none of {', '.join(FAIR.values())}")
    figure, panels = pyplot.subplots(
        1, len(engines), figsize=(5 * len(engines), 3.6), squeeze=False
    )
    for axes, engine in zip(panels[0], engines, strict=True):
        runs = runs_of(FAIR[engine])
        levels = rows_by_level(runs)
        heights = [bar_heights(cells) for cells in levels.values()]
        for number, (label, color) in enumerate(zip(BARS, COLORS, strict=True)):
            medians = [group[number][0] for group in heights]
            below = [group[number][0] - group[number][1] for group in heights]
            above = [group[number][2] - group[number][0] for group in heights]
            at = [group + (number - 1) * 0.25 for group in range(len(heights))]
            axes.bar(at, medians, 0.25, yerr=(below, above), color=color, label=label, capsize=2)
        axes.set_xticks(range(len(levels)), [str(level) for level in levels])
        axes.set_xlabel("requests in flight")
        axes.set_ylabel("output tokens/s")
        version = runs[0]["versions"][engine]
        axes.set_title(f"{ENGINES[engine]} {version}, {runs[0]['device']}", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].legend(loc="upper left", fontsize=8)
    figure.suptitle("Qwen3-8B's shape, dummy weights, acceptance replayed", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
