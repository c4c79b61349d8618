"""Acceptance length τ of DFlash 2 beside DFlash."""

from __future__ import annotations

from tools.tables.common import commands_of, load, table, where


def dflash2(name: str) -> str:
    """τ of both drafters by set, then how often a draft stands if those before it do."""
    runs = load(name)["runs"][:4]
    pairs = [runs[:2], runs[2:]]
    names = [result["set_name"] for result in runs[0]["sets"]]
    rows = [
        [
            name,
            *(
                cell
                for one, two in pairs
                for cell in beside(one["sets"][index]["tau"], two["sets"][index]["tau"])
            ),
        ]
        for index, name in enumerate(names)
    ]
    means = [cell for one, two in pairs for cell in beside(one["mean_tau"], two["mean_tau"])]
    header = ["set", "DFlash", "DFlash 2", "", "T = 1: DFlash", "DFlash 2", ""]
    count = len(runs[0]["sets"][0]["acceptance"])
    by_position = [
        [
            f"{'DFlash 2' if run['drafter'] == 'dflash2' else 'DFlash'}, T = {run['temperature']}",
            *(f"{share:.2f}" for share in conditional(run["sets"])),
        ]
        for run in runs
    ]
    position_header = ["", *(f"draft {k}" for k in range(1, count + 1))]
    commands = commands_of(runs)
    facts = f"{where(runs[0])}, batch {runs[0]['batch']}. {commands}"
    whole = table(header, [*rows, ["mean", *means]])
    return f"{whole}\n\n{table(position_header, by_position)}\n\n{facts}"


def dflash2_by_temperature() -> str:
    """Mean τ of both drafters, and what DFlash 2 gains on every set."""
    runs = load("smollm2-dflash2-mixed-acceptance")["runs"]
    pairs = sorted(zip(runs[::2], runs[1::2], strict=True), key=lambda pair: pair[0]["temperature"])
    rows = [
        [
            f"T = {one['temperature']}",
            *beside(one["mean_tau"], two["mean_tau"]),
            *(
                beside(a["tau"], b["tau"])[-1]
                for a, b in zip(one["sets"], two["sets"], strict=True)
            ),
        ]
        for one, two in pairs
    ]
    names = [result["set_name"] for result in runs[0]["sets"]]
    commands = commands_of(runs[4:])
    return f"{table(['', 'DFlash', 'DFlash 2', 'mean', *names], rows)}\n\nAs above; {commands}"


def dflash2_greedy() -> str:
    """τ of both drafters by set, of greedy text alone."""
    one, two = load("smollm2-dflash2-acceptance")["runs"][:2]
    rows = [
        [a["set_name"], *beside(a["tau"], b["tau"])]
        for a, b in zip(one["sets"], two["sets"], strict=True)
    ]
    mean = ["mean", *beside(one["mean_tau"], two["mean_tau"])]
    header = ["set", "DFlash", "DFlash 2", ""]
    return f"{table(header, [*rows, mean])}\n\n{where(one)}, batch {one['batch']}."


def first_draft() -> str:
    """How often first drafts stand at temperature 1, by what they are drawn from."""
    record = load("first-draft-cpu")
    columns = {
        "vocabulary": "from the vocabulary",
        "candidates": "from the candidates",
        "after_candidate": "behind a candidate",
        "after_other": "behind another token",
        "mass": "the target's share of candidates",
    }
    rows = [
        [f"`{name}`", *(f"{found[key]:.2f}" if key in found else "" for key in columns)]
        for name, found in record["drafters"].items()
    ]
    positions = next(iter(record["drafters"].values()))["positions"]
    versions = record["versions"]
    facts = (
        f"{positions:,} positions of {record['texts']} texts, CPU, float32, torch "
        f"{versions['torch']}, Transformers {versions['transformers']}, {record['date']}. "
        f"`{record['command']}`"
    )
    return f"{table(['drafter', *columns.values()], rows)}\n\n{facts}"


def beside(one: float, two: float) -> list[str]:
    return [f"{one:.2f}", f"**{two:.2f}**", f"{two / one - 1:+.1%}"]


def conditional(sets: list[dict]) -> list[float]:
    """Share of drafts that stood of those whose predecessors did, over all passes of all sets."""
    passes = sum(result["passes"] for result in sets)
    positions = range(len(sets[0]["acceptance"]))
    stood = [sum(result["passes"] * result["acceptance"][k] for result in sets) for k in positions]
    return [now / before for before, now in zip([passes, *stood[:-1]], stood, strict=True)]
