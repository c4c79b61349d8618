"""Trees of drafts beside the chain: τ and speed."""

from __future__ import annotations

from tools.tables.common import commands_of, measured, not_measured, runs_of, table, where


def trees_gain(name: str) -> str:
    """τ by rows beside the chain at one request, and what siblings gave."""
    lines, chain = [], 0.0
    for run, row in of_trees(name):
        if row["batch"] != 1:
            continue
        temperature = "greedy" if row["temperature"] == 0 else f"T = {row['temperature']}"
        if row["rows"] == 0:
            on_same_texts = run.get("chain_tau_on_trees_texts", {})
            chain = on_same_texts.get(str(row["temperature"]), row["tau"])
            lines.append([temperature, "chain", f"{chain:.3f}", "", "", "", ""])
            continue
        passes = row["passes"]
        lines.append(
            [
                temperature,
                f"+{row['rows']}",
                f"{row['tau']:.3f}",
                f"{row['tau'] / chain:.2f}",
                f"{row['siblings']} of {row['rejections']}",
                f"{row['gained'] / passes:.2f}",
                f"{row['behind'] / passes:.2f}",
            ]
        )
    header = ["", "rows", "τ", "of the chain", "siblings held", "gained a pass", "in the tree"]
    return f"{table(header, lines)}\n\n{trees_facts(name)}"


def trees_speed(name: str) -> str:
    """Tokens/s and milliseconds of a step by requests and rows beside the chain."""
    if not measured(name):
        return not_measured(name)
    cells: dict[tuple[float, int], list[dict]] = {}
    for _, row in of_trees(name):
        cells.setdefault((row["temperature"], row["batch"]), []).append(row)
    lines = []
    for (temperature, batch), rows in sorted(cells.items()):
        speeds = [row["tokens_per_second"] for row in rows]
        steps = [row["step_milliseconds"] for row in rows]
        lines.append(
            [
                "greedy" if temperature == 0 else f"T = {temperature}",
                str(batch),
                *(
                    f"{speed:,.1f} ({speed / speeds[0]:.2f}), {step:.2f} ms"
                    for speed, step in zip(speeds, steps, strict=True)
                ),
            ]
        )
    sizes = [row["rows"] for row in next(iter(cells.values()))]
    header = ["", "requests", "chain", *(f"+{size}" for size in sizes[1:])]
    return f"{table(header, lines)}\n\n{trees_facts(name)}"


def of_trees(name: str) -> list[tuple[dict, dict]]:
    """Every row of a trees record, beside its run."""
    return [(run, row) for run in runs_of(name) for row in run["rows"]]


def trees_facts(name: str) -> str:
    runs = runs_of(name)
    counts = " and ".join(str(run["prompts"]) for run in runs)
    commands = commands_of(runs)
    return (
        f"{counts} prompts, {runs[0]['max_new_tokens']} tokens, {runs[0]['num_drafts']} drafts; "
        f"{where(runs[0])}. {commands}"
    )
