"""Simulated tokens per second of the policies that choose how many drafts are verified."""

from __future__ import annotations

from tools.tables.common import load, table

MIXED = ("fixed 0", "fixed 7", "fixed 3", "by step", "adaptive")


def mixed(name: str) -> str:
    """Simulated tokens per second of one request, where half of them are easy and half hard."""
    record = load(name)
    levels = sorted({row["requests"] for row in record["mixed"]})
    cells = {(row["policy"], row["requests"]): row for row in record["mixed"]}
    rows = [
        [
            policy.replace("fixed", "always").replace("always 0", "no drafts"),
            *(
                f"{cells[policy, level]['easy']} / {cells[policy, level]['hard']}"
                for level in levels
            ),
        ]
        for policy in MIXED
    ]
    header = ["policy", *(f"{level} requests" for level in levels)]
    facts = f"{record['texts']} texts, {record['date']}. `{record['command']}`"
    return f"{table(header, rows)}\n\n{facts}"


def budget(name: str) -> str:
    """Simulated tokens per second of the adaptive policy, the best fixed one and the oracle."""
    record = load(name)
    rows = []
    for row in record["rows"]:
        rates = row["tokens_per_second"]
        rows.append(
            [
                str(row["requests"]),
                f"{rates['fixed 0']:,.0f}",
                f"{rates[row['best_fixed']]:,.0f} ({row['best_fixed'].removeprefix('fixed ')})",
                f"{rates['by step']:,.0f}",
                f"{rates['adaptive']:,.0f}",
                f"{rates['oracle']:,.0f}",
                f"{row['against_best_fixed']:.2f}",
                f"{row['against_oracle']:.2f}",
            ]
        )
    header = ["requests", "no drafts", "best fixed (drafts)", "by step", "adaptive", "oracle"]
    facts = f"{record['texts']} texts, τ {record['tau']}, {record['date']}. `{record['command']}`"
    return f"{table([*header, 'of best fixed', 'of oracle'], rows)}\n\n{facts}"
