"""Acceptance length τ of DFlash and how many greedy texts are the target's own."""

from __future__ import annotations

from tools.tables.common import commands_of, load, table, where


def acceptance() -> str:
    record = load("smollm2-acceptance")
    rows = []
    for result in record["sets"]:
        shares = [f"{share:.2f}" for share in result["acceptance"]]
        equal = f"{result['equal']}/{result['prompts']}"
        rows.append([result["set_name"], f"**{result['tau']:.2f}**", *shares, equal])
    header = ["set", "τ", *(f"at {k}" for k in range(1, 8)), "same text"]
    mean = f"Mean τ {record['mean_tau']:.2f}; {where(record)}, batch {record['batch']}. "
    return f"{table(header, rows)}\n\n{mean}`{record['command']}`"


def draft_weights() -> str:
    runs = load("draft-weights-cpu")["runs"]
    header = ["draft weights", *(result["set_name"] for result in runs[0]["sets"]), "mean τ"]
    rows = [
        [
            run["draft_weights"],
            *(f"{result['tau']:.2f}" for result in run["sets"]),
            f"**{run['mean_tau']:.2f}**",
        ]
        for run in runs
    ]
    facts = f"{where(runs[-1])}, batch {runs[-1]['batch']}. `{runs[-1]['command']}`"
    return f"{table(header, rows)}\n\n{facts}"


def greedy_texts() -> str:
    """How many greedy texts of each engine equal the target's own."""
    records = [load(f"greedy-texts-{engine}-cpu") for engine in ("transformers", "vllm", "sglang")]
    rows = [
        [
            " ".join((record["engine"], record["versions"].get(record["engine"], ""))).strip(),
            f"{record['equal']:,} of {record['of']:,}",
            str(len(record["ties"])),
            f"{record['tau']:.2f}",
        ]
        for record in records
    ]
    first = records[0]
    facts = f"{first['prompts']:,} prompts, {first['tokens']} tokens, {first['device']}, float32, "
    facts += f"torch {first['versions']['torch']}, {first['date']}. "
    commands = commands_of(records)
    header = ["engine", "same text", "ties", "τ"]
    return f"{table(header, rows)}\n\n{facts}{commands}"
