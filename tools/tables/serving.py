"""Output tokens per second by mode and requests in flight."""

from __future__ import annotations

from tools.tables.common import commands_of, load, runs_of, table, versions_of, where

ALONE_AND_TWO = ("none", "native", "plugin")


def serving(name: str, shown: tuple[str, ...] | None = None) -> str:
    """Output tokens per second by mode and requests in flight: median (lowest-highest), τ.

    Args:
        name: the result file's name without ".json".
        shown: the modes that get a column; all when None.
    """
    runs = runs_of(name)
    record, every = runs[0], [row for run in runs for row in run["rows"]]
    cells = {(row["engine"], row["concurrency"]): row for row in every}
    engines = [
        one for one in dict.fromkeys(row["engine"] for row in every) if not shown or one in shown
    ]
    rows = []
    for level in sorted({row["concurrency"] for row in every}):
        line = [str(level)]
        for one in engines:
            cell = cells.get((one, level))
            if cell is None:
                line.append("")
                continue
            low, high = min(cell["all"]), max(cell["all"])
            tau = f", τ {cell['tau']:.2f}" if one != "none" else ""
            line.append(f"{cell['tokens_per_second']:,.0f} ({low:,.0f}-{high:,.0f}){tau}")
        rows.append(line)
    versions = versions_of(record)
    facts = f"{record['device']}, {record['dtype']}, {versions}, {record['date']}; "
    counts = sorted({len(row["all"]) for row in every})
    facts += f"{'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} runs in turns. "
    header = ["requests", *map(name_of, engines)]
    commands = commands_of(runs)
    return f"{table(header, rows)}\n\n{facts}{commands}"


def startup(names: dict[str, str]) -> str:
    """Seconds that engines took to start, by mode.

    Args:
        names: result files without ".json", and what was started there.
    """
    records = {what: load(name)["startup_seconds"] for name, what in names.items()}
    modes = list(dict.fromkeys(mode for seconds in records.values() for mode in seconds))
    rows = [
        [what, *(f"{seconds[mode]:.0f}" if mode in seconds else "" for mode in modes)]
        for what, seconds in records.items()
    ]
    return table(["seconds to start", *map(name_of, modes)], rows)


def engine(name: str) -> str:
    record = load(name)
    rows = [
        [
            row["engine"],
            str(row["batch"]),
            str(row["requests"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tau']:.2f}",
        ]
        for row in record["rows"]
    ]
    header = ["engine", "batch", "requests", "tokens/s", "τ"]
    facts = f"{where(record)}; medians of {record['repeats']} runs in turns. "
    return f"{table(header, rows)}\n\n{facts}`{record['command']}`"


PARTS = {
    "fp8": "FP8 drafter",
    "adaptive": "adaptive",
    "fixed": "whole blocks",
    "triton": "Triton attention",
    "whole": "prompts captured whole",
}


def name_of(mode: str) -> str:
    """A benchmark's mode in words: "native, 7 drafts" for native-k7."""
    kind, *settings = mode.split("-")
    words = [
        f"{part[1:]} drafts" if part[0] == "k" and part[1:].isdigit() else PARTS[part]
        for part in settings
    ]
    return ", ".join(["no drafter" if kind == "none" else kind, *words])
