"""Acceptance length τ of sampled requests, by temperature and how drafts are drawn."""

from __future__ import annotations

from tools.tables.common import load, measured, table, versions_of, where


def draft_sampling() -> str:
    """Expected τ by temperature and limits, with the best of each row in bold."""
    record = load("draft-sampling-cpu")
    ways = ["greedy", "factor 0.5", "factor 0.75", "probabilistic", "auto"]
    shown = ["probabilistic, token by token", *ways]
    rows = []
    for row in record["rows"]:
        best = max(row["tau"][way] for way in ways)
        cells = [f"{row['tau'][way]:.3f}" for way in shown]
        cells = [
            f"**{cell}**" if row["tau"][way] == best else cell
            for way, cell in zip(shown, cells, strict=True)
        ]
        rows.append([row["drafter"], str(row["temperature"]), row["limits"], *cells])
    header = ["drafter", "T", "limits", "drawn, token by token", "argmax", "0.5", "0.75", "drawn"]
    least = min(row["positions"] for row in record["rows"])
    commands = "; ".join(f"`{command}`" for command in record["commands"])
    facts = f"{record['prompts']} prompts, {least} or more positions a row; {where(record)}."
    return f"{table([*header, 'auto'], rows)}\n\n{facts} {commands}"


def sglang_sampling() -> str:
    """τ in SGLang, by temperature and how drafts are made."""
    record = load("sglang-sampling-cpu")
    ways = ["probabilistic, token by token", "greedy", "probabilistic", "auto"]
    found = {(row["temperature"], row["draft_sampling"]): row for row in record["rows"]}
    rows = [
        [str(temperature), *(f"{found[temperature, way]['tau']:.2f}" for way in ways)]
        for temperature in sorted({temperature for temperature, _ in found})
    ]
    versions = versions_of(record)
    commands = "; ".join(f"`{command}`" for command in record["commands"])
    tokens = min(row["tokens"] for row in record["rows"])
    facts = f"{record['prompts']} prompts, {tokens:,} tokens a cell; {record['device']}, float32,"
    header = ["T", "drawn, token by token", *(f"`{way}`" for way in ways[1:])]
    before = f"token by token at commit {record['token_by_token_commit']}"
    return f"{table(header, rows)}\n\n{facts} {versions}, {record['date']}; {before}. {commands}"


ENGINES = {"transformers": "Transformers", "sglang": "SGLang", "vllm": "vLLM"}


def sampled_tau() -> str:
    """τ of sampled requests in every engine, and how far engines lie apart."""
    records = {
        engine: load(f"sampled-tau-{engine}-cpu")
        for engine in ENGINES
        if measured(f"sampled-tau-{engine}-cpu")
    }
    found = {
        (row["drafter"], row["temperature"], row["limits"], row["draft_sampling"], engine): row
        for engine, record in records.items()
        for row in record["rows"]
    }
    ways = [(way, engine) for way in ("greedy", "probabilistic") for engine in records]
    names = {"smollm2-135m-dflash": "DFlash", "smollm2-135m-dflash2": "DFlash 2"}
    rows = []
    for drafter, temperature, limits in dict.fromkeys(key[:3] for key in found):
        cells = [found.get((drafter, temperature, limits, *way)) for way in ways]
        taus = [f"{cell['tau']:.2f}" if cell else "" for cell in cells]
        rows.append([names[drafter], str(temperature), limits, *taus])
    shown = {"greedy": "argmax", "probabilistic": "drawn"}
    header = ["drafter", "T", "limits", *(f"{shown[way]}, {ENGINES[e]}" for way, e in ways)]
    one = next(iter(records.values()))
    facts = [f"{one['prompts']} prompts of {one['max_new_tokens']} tokens a cell; {one['device']}"]
    for engine, record in records.items():
        versions = versions_of(record)
        facts.append(f"{ENGINES[engine]} ({versions}, {record['date']}): `{record['command']}`")
    lines = [*apart(found, list(records)), "; ".join(facts) + "."]
    return f"{table(header, rows)}\n\n" + "\n\n".join(lines)


def apart(found: dict, engines: list[str]) -> list[str]:
    """How τ of each other engine differs from the Transformers engine's, by way to make drafts."""
    lines = []
    for engine in engines[1:]:
        for way in ("greedy", "probabilistic"):
            pairs = [
                (row, found[(*key[:3], way, "transformers")], key[1:3])
                for key, row in found.items()
                if key[3:] == (way, engine) and (*key[:3], way, "transformers") in found
            ]
            if not pairs:
                continue
            ratios = [row["tau"] / ours["tau"] - 1 for row, ours, _ in pairs]
            errors = [ours["error"] / ours["tau"] for _, ours, _ in pairs]
            mean, most = sum(ratios) / len(ratios), max(ratios, key=abs)
            # Of a difference between two engines that draw independently. Drafters have the same
            # noise, so that their cells differ together.
            together: dict[tuple, float] = {}
            for error, (_, _, cell) in zip(errors, pairs, strict=True):
                together[cell] = together.get(cell, 0.0) + error
            chance = (2 * sum(error**2 for error in together.values())) ** 0.5 / len(errors)
            lines.append(
                f"- {ENGINES[engine]}, {'argmax' if way == 'greedy' else 'drawn'}: "
                f"{100 * mean:+.1f} % on average over {len(pairs)} cells (independent draws would "
                f"differ by {100 * chance:.1f} %), at most {100 * most:+.1f} % in a cell "
                f"({100 * 2**0.5 * sum(errors) / len(errors):.0f} %)."
            )
    head = "τ beside the Transformers engine's (in brackets: one standard error of chance):"
    return ["\n".join([head, "", *lines])] if lines else []
