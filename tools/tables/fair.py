"""Output tokens per second against the engine's own DFlash at its best setting."""

from __future__ import annotations

import json
import shlex

from tools.tables.common import (
    ROOT,
    commands_of,
    measured,
    not_measured,
    runs_of,
    table,
    versions_of,
)
from tools.tables.serving import name_of

FAIR = {
    "vllm": "vllm-h200-qwen3-8b-whole-prompts",
    "sglang": "sglang-h200-qwen3-8b-whole-prompts",
}
NOT_MEASURED = "not measured"
PLOT = "docs/speed-qwen3-8b.svg"


def fair(name: str, ranges: bool = True) -> str:
    """Tokens per second against the engine's own DFlash at its best setting.

    The best setting is chosen for every number of requests, on both sides.

    Args:
        name: the result file's name without ".json".
        ranges: shows the slowest and the fastest run.
    """
    if not measured(name):
        return not_measured(name)
    runs = runs_of(name)
    rows = []
    for level, cells in rows_by_level(runs).items():
        none = fastest(cells, "none")
        native, plugin = fastest(cells, "native"), fastest(cells, "plugin")
        options = {mode: cell for mode, cell in cells.items() if mode.startswith("plugin-")}
        rows.append(
            [
                str(level),
                speed(cells, none, setting=none != "none", ranges=ranges),
                speed(cells, "native", ranges=ranges),
                speed(cells, native, setting=True, ranges=ranges),
                speed(cells, "plugin", ranges=ranges),
                speed(cells, fastest(options, "plugin"), setting=True, ranges=ranges),
                gain(cells[plugin], cells[native]),
            ]
        )
    header = [
        "requests",
        "no drafter",
        "native as it comes",
        "native at its best setting",
        "plugin as it comes",
        "plugin with options",
        "best plugin / best native",
    ]
    header, rows = without_empty(header, rows)
    record = runs[0]
    versions = versions_of(record)
    every = [cell for cells in rows_by_level(runs).values() for cell in cells.values()]
    counts = sorted({len(cell["all"]) for cell in every})
    repeats = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    title = (
        "Output tokens/s: Qwen3-8B's shape, **dummy weights, acceptance replayed at "
        f"{record['acceptance_replayed']}**, {record['num_speculative_tokens']} drafts; "
        f"{'median (lowest-highest)' if ranges else 'medians'}, {attention_backends(runs)}."
    )
    facts = f"{record['device']}, {record['dtype']}, {versions}, {record['date']}; {repeats} runs"
    commands = commands_of(runs)
    return f"{title}\n\n{table(header, rows)}\n\n{facts} in turns. {commands}"


def summary(engine: str) -> str:
    """The fair table without its command, for the first page."""
    text = fair(FAIR[engine], ranges=False)
    if not measured(FAIR[engine]):
        return text
    return text.split(" `python", 1)[0] + " Ranges and commands: [results](docs/results.md)."


def plot() -> str:
    """The speed plot, or the picture of a step while nothing fair is measured."""
    if any(map(measured, FAIR.values())) and (ROOT / PLOT).is_file():
        return f"![Output tokens/s by requests in flight: native and plugin]({PLOT})"
    return "![One step: injection, draft, verification, commit](docs/how-it-works.svg)"


def rows_by_level(runs: list[dict]) -> dict[int, dict[str, dict]]:
    """Speeds by requests in flight and mode.

    Of a mode that was measured in two groups the first counts: replayed acceptance is the same
    for all engines of one group, and another for the next.
    """
    found: dict[int, dict[str, dict]] = {}
    for row in (row for run in runs for row in run["rows"]):
        cells = found.setdefault(row["concurrency"], {})
        cells.setdefault(row["engine"], row)
    return dict(sorted(found.items()))


def fastest(cells: dict[str, dict], mode: str) -> str | None:
    """The fastest mode that is ``mode`` or one of its settings, such as native-k7 of native."""
    names = [name for name in cells if name == mode or name.startswith(f"{mode}-")]
    return max(names, key=lambda name: cells[name]["tokens_per_second"], default=None)


def speed(
    cells: dict[str, dict], mode: str | None, setting: bool = False, ranges: bool = True
) -> str:
    """A cell of a speed table: median (lowest-highest), and which setting it is."""
    if mode is None or mode not in cells:
        return NOT_MEASURED
    cell = cells[mode]
    text = f"{cell['tokens_per_second']:,.0f}"
    if ranges:
        text += f" ({min(cell['all']):,.0f}-{max(cell['all']):,.0f})"
    if not setting:
        return text
    name = name_of(mode).partition(", ")[2] or "as it comes"
    return f"{text}, {name}"


def gain(plugin: dict, native: dict) -> str:
    """How many times as fast the plugin is; bold only where no run of one reaches the other's."""
    ratio = f"{plugin['tokens_per_second'] / native['tokens_per_second']:.2f}×"
    slower, faster = sorted((plugin, native), key=lambda row: row["tokens_per_second"])
    return f"**{ratio}**" if max(slower["all"]) < min(faster["all"]) else f"{ratio}, ranges overlap"


def without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns in which nothing is measured."""
    kept = [i for i in range(len(header)) if any(row[i] != NOT_MEASURED for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def attention_backends(runs: list[dict]) -> str:
    """The attention back end of every mode.

    Raises:
        ValueError: the record does not say which one a run used.
    """
    found: dict[str, str] = {}
    for run in runs:
        named = run.get("attention")
        shared = run.get("engine_arguments", {}).get("attention_backend") or of_settings(run)
        for mode in dict.fromkeys(row["engine"] for row in run["rows"]):
            backend = named.get(mode) if named else shared
            if not backend:
                raise ValueError(f"{run['command']}: the attention back end of {mode} is unknown")
            found[mode] = backend
    backends = list(dict.fromkeys(found.values()))
    if len(backends) == 1:
        return f"attention back end: {backends[0]}"
    by_backend = (
        f"{backend} ({'; '.join(name_of(mode) for mode in found if found[mode] == backend)})"
        for backend in backends
    )
    return f"attention back ends: {', '.join(by_backend)}"


def of_settings(run: dict) -> str | None:
    """``attention_config.backend`` in the ``--settings`` of a recorded command."""
    words = shlex.split(run["command"])
    if "--settings" not in words:
        return None
    settings = json.loads(words[words.index("--settings") + 1])
    return settings.get("attention_config", {}).get("backend")
