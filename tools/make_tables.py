"""Write the result tables of README.md and docs/ from the JSON files in benchmarks/results.

python tools/make_tables.py          rewrite them
python tools/make_tables.py --check  exit 1 if one is not up to date
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict:
    """A recorded result.

    Recorded commands name full prompt sets by a path outside the repository; tables name the files
    alone, and the pages say where the sets come from.
    """
    text = (RESULTS / f"{name}.json").read_text()
    return json.loads(text.replace("../shared/data/", ""))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    commands = "; ".join(f"`{run['command']}`" for run in runs)
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
    commands = "; ".join(f"`{run['command']}`" for run in runs[4:])
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
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
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
        if (RESULTS / f"sampled-tau-{engine}-cpu.json").exists()
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
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
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
        return f"Not measured yet: this table is made from `benchmarks/results/{name}.json`."
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
    commands = "; ".join(f"`{run['command']}`" for run in runs)
    return (
        f"{counts} prompts, {runs[0]['max_new_tokens']} tokens, {runs[0]['num_drafts']} drafts; "
        f"{where(runs[0])}. {commands}"
    )


def beside(one: float, two: float) -> list[str]:
    return [f"{one:.2f}", f"**{two:.2f}**", f"{two / one - 1:+.1%}"]


def conditional(sets: list[dict]) -> list[float]:
    """Share of drafts that stood of those whose predecessors did, over all passes of all sets."""
    passes = sum(result["passes"] for result in sets)
    positions = range(len(sets[0]["acceptance"]))
    stood = [sum(result["passes"] * result["acceptance"][k] for result in sets) for k in positions]
    return [now / before for before, now in zip([passes, *stood[:-1]], stood, strict=True)]


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


def draft_step() -> str:
    """A step's microseconds, and by how much each part lengthens it."""
    record = load("draft-step-h200")
    kinds = {
        "dflash": "DFlash",
        "convolutions": "with convolutions",
        "selector": "with a selector",
        "dflash2": "DFlash 2",
        "dflash2_sampled": "DFlash 2, sampled",
    }
    rows = [
        [
            str(row["requests"]),
            f"{row['dflash']:,.0f} µs",
            *(
                f"{row[kind]:,.0f} µs ({row[kind] / row['dflash'] - 1:+.0%})"
                for kind in list(kinds)[1:]
            ),
        ]
        for row in record["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    facts = f"{record['device']}, bfloat16, {versions}, {record['date']}. `{record['command']}`"
    return f"{table(['requests', *kinds.values()], rows)}\n\n{facts}"


def pair(row: dict) -> list[str]:
    """A target with recurrent layers, and its drafter."""
    target, drafter = row["target"], row["drafter"]
    layers = [f"{drafter[kind]} {kind}" for kind in ("windowed", "full") if drafter[kind]]
    return [
        f"{target['name']}: {target['recurrent']} recurrent, {target['full']} full "
        f"({target['kv_heads']} × {target['head_dim']})",
        f"{', '.join(layers)} ({drafter['kv_heads']} × {drafter['head_dim']})",
    ]


def cache_groups() -> str:
    """Groups of vLLM's cache and the tokens that they hold."""
    record = load("vllm-cache-groups")
    ways = ["alone", "native", "plugin"]
    rows = [
        [
            *pair(row),
            f"{row['length']:,}",
            *(f"{row[way]['groups']}, {row[way]['tokens_in_gib']:,}" for way in ways),
        ]
        for row in record["rows"]
    ]
    header = ["target", "drafter", "longest request", "alone", "natively", "with the plugin"]
    facts = f"{record['drafts']} drafts, prefix caching; vLLM {record['vllm']}, {record['date']}."
    return f"{table(header, rows)}\n\n{facts} `{record['command']}`"


def cached_prefixes() -> str:
    """Tokens of a repeated prompt that vLLM finds again."""
    record = load("vllm-cache-groups")
    rows = [
        [
            *pair(row),
            f"{row['alone']['cached']:,}",
            f"{row['native']['cached_dropping']:,}",
            f"{row['native']['cached']:,}",
            f"{row['plugin']['cached']:,}",
        ]
        for row in record["rows"]
        if row["length"] == max(one["length"] for one in record["rows"])
    ]
    header = ["target", "drafter", "alone", "natively, 0.31 and 0.32", "natively, 0.33"]
    return (
        f"{table([*header, 'with the plugin'], rows)}\n\nOf {record['prompt']:,} tokens; as above."
    )


def where(record: dict) -> str:
    return (
        f"{record['device']}, {record['dtype']}, torch {record['torch']}, Transformers "
        f"{record['transformers']}, {record['date']}"
    )


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
    commands = "; ".join(f"`{record['command']}`" for record in records)
    header = ["engine", "same text", "ties", "τ"]
    return f"{table(header, rows)}\n\n{facts}{commands}"


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
}


def name_of(mode: str) -> str:
    """A benchmark's mode in words: "native, 7 drafts" for native-k7."""
    kind, *settings = mode.split("-")
    words = [
        f"{part[1:]} drafts" if part[0] == "k" and part[1:].isdigit() else PARTS[part]
        for part in settings
    ]
    return ", ".join(["no drafter" if kind == "none" else kind, *words])


def serving(name: str, shown: tuple[str, ...] | None = None) -> str:
    """Output tokens per second by mode and requests in flight: median (lowest-highest), τ.

    Args:
        name: the result file's name without ".json".
        shown: the modes that get a column; all when None.
    """
    record = load(name)
    runs = record.get("runs", [record])
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
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    facts = f"{record['device']}, {record['dtype']}, {versions}, {record['date']}; "
    counts = sorted({len(row["all"]) for row in every})
    facts += f"{'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} runs in turns. "
    header = ["requests", *map(name_of, engines)]
    commands = "; ".join(f"`{run['command']}`" for run in runs)
    return f"{table(header, rows)}\n\n{facts}{commands}"


FAIR = {"vllm": "vllm-h200-qwen3-8b-default", "sglang": "sglang-h200-qwen3-8b-default"}
NOT_MEASURED = "not measured"
PLOT = "docs/speed-qwen3-8b.svg"


def runs_of(name: str) -> list[dict]:
    """The records of a serving result: one file may join several runs."""
    record = load(name)
    return record.get("runs", [record])


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").is_file()


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


def fair(name: str, ranges: bool = True) -> str:
    """Tokens per second against the engine's own DFlash at its best setting.

    The best setting is chosen for every number of requests, on both sides.

    Args:
        name: the result file's name without ".json".
        ranges: shows the slowest and the fastest run.
    """
    if not measured(name):
        return f"Not measured yet: this table is made from `benchmarks/results/{name}.json`."
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
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    every = [cell for cells in rows_by_level(runs).values() for cell in cells.values()]
    counts = sorted({len(cell["all"]) for cell in every})
    repeats = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    title = (
        "Output tokens/s: Qwen3-8B's shape, **dummy weights, acceptance replayed at "
        f"{record['acceptance_replayed']}**, {record['num_speculative_tokens']} drafts; "
        f"{'median (lowest-highest)' if ranges else 'medians'}, {attention_backends(runs)}."
    )
    facts = f"{record['device']}, {record['dtype']}, {versions}, {record['date']}; {repeats} runs"
    commands = "; ".join(f"`{run['command']}`" for run in runs)
    return f"{title}\n\n{table(header, rows)}\n\n{facts} in turns. {commands}"


def without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns in which nothing is measured."""
    kept = [i for i in range(len(header)) if any(row[i] != NOT_MEASURED for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def gain(plugin: dict, native: dict) -> str:
    """How many times as fast the plugin is; bold only where no run of one reaches the other's."""
    ratio = f"{plugin['tokens_per_second'] / native['tokens_per_second']:.2f}×"
    slower, faster = sorted((plugin, native), key=lambda row: row["tokens_per_second"])
    return f"**{ratio}**" if max(slower["all"]) < min(faster["all"]) else f"{ratio}, ranges overlap"


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


def soak(name: str, engine: str, paused: str) -> str:
    """A recorded soak.

    Args:
        name: the result file's name without ".json".
        engine: the engine's name; in lower case, the key of its version.
        paused: the engine's word for requests that wait for memory in mid-text.
    """
    record = load(name)
    row = [
        f"{record['device']}, {engine} {record['versions'][engine.lower()]}",
        *(f"{record[key]:,}" for key in ("steps", "finished", "aborted", paused)),
        f"{record['prefix_hits']:,}",
        f"{len(record['mismatches'])}",
        f"{record['growth_mb']['resident_mb']:+.0f} MB",
    ]
    header = ["on", "steps", "finished", "aborted", paused, "cached tokens hit"]
    return table([*header, "texts that differ", "growth, last third"], [row])


def timelines(name: str, plugin: str = "plugin-fp8") -> str:
    """Where the milliseconds of a decode step go, of native and a mode of the plugin."""
    runs = runs_of(name)
    found = [line for run in runs for line in run["timelines"]]
    parts = ("verify graph", "other graphs", "eager", "idle", "step")
    rows = [
        [str(level), name, *(f"{times[part]:.2f}" for part in parts), launches]
        for level in sorted({line["concurrency"] for line in found})
        for line in found
        if line["concurrency"] == level and line["engine"] in ("native", plugin)
        for name, times, launches in kinds_of_steps(line)
    ]
    header = ["requests", "", "verify graph", "draft graph", "eager", "idle", "whole step"]
    commands = "; ".join(f"`{run['command']}`" for run in runs)
    facts = f"{runs[0]['device']}, {runs[0]['date']}. {commands}"
    return f"{table([*header, 'eager launches'], rows)}\n\n{facts}"


def kinds_of_steps(line: dict) -> Iterator[tuple[str, dict[str, float], str]]:
    """A timeline's steps without prompts and, where there are some, those that read prompts."""
    name = name_of(line["engine"])
    yield name, line["milliseconds"], f"{line['eager_launches']:.0f}"
    if "with_prompts" in line:
        with_prompts = line["with_prompts"]
        yield f"{name}, steps with prompts", with_prompts["milliseconds"], ""


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


SHOWN = (
    "inject_kv", "draft_head", "draft_head_fp8", "fp8_product", "fp8_product_down",
    "draft_attention", "draft_attention_batch",
)  # fmt: skip
SHOWN_OF_DFLASH2 = (
    "projected_convolution", "convolve_add_rms_norm", "draft_head_candidates", "best_logits",
)  # fmt: skip


def kernels(name: str, ops: tuple[str, ...] = SHOWN) -> str:
    """Microseconds of the kernels that replace something of an engine's."""
    record = load(name)
    rows = [
        [
            row["op"],
            f"{row['rows']:,}",
            *(f"{row[key]:,.1f}" for key in ("kernel_us", "engine_us", "copy_us", "twin_us")),
            f"{row['engine_us'] / row['kernel_us']:.2f}",
        ]
        for row in record["rows"]
        if row["op"] in ops
    ]
    header = ["operation", "size", "kernel", "instead", "copy of as many bytes", "twin"]
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    facts = f"{record['device']}, {record['dtype']}, {versions}, {record['date']}. "
    return f"{table([*header, 'times as fast'], rows)}\n\n{facts}`{record['command']}`"


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


ALONE_AND_TWO = ("none", "native", "plugin")
REPLAYS = {
    "vllm-replay": lambda: serving("vllm-h200-qwen3-8b-replay"),
    "sglang-replay": lambda: serving("sglang-h200-qwen3-8b-replay"),
}
# Engines and runners in the order of the table of targets; every family has an entry for each.
TARGET_COLUMNS = {
    "transformers": "Transformers",
    "vllm_v1": "vLLM V1",
    "vllm_v2": "vLLM V2",
    "sglang": "SGLang",
}


def targets() -> str:
    """What each engine does with each family of targets."""
    record = load("targets")
    rows = [
        [
            row["family"],
            f"`{row['model_type']}`",
            row["trait"],
            *(row[column]["text"] for column in TARGET_COLUMNS),
        ]
        for row in record["families"]
    ]
    header = ["family", "model type", "what is special", *TARGET_COLUMNS.values()]
    versions = dict.fromkeys(record["versions"][column] for column in TARGET_COLUMNS)
    return f"{table(header, rows)}\n\n{'; '.join(versions)}."


def refusals() -> str:
    """Why a family is refused, in the engine's words, without numbers that change."""
    rows = [
        [row["family"], title, re.sub(r"relative difference [\d.e-]+; ", "", message)]
        for row in load("targets")["families"]
        for column, title in TARGET_COLUMNS.items()
        if (message := row[column].get("message"))
    ]
    return table(["family", "engine", "refusal"], rows)


# Sections by file.
SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "plot": plot,
        "vllm-fair": lambda: summary("vllm"),
        "sglang-fair": lambda: summary("sglang"),
        "acceptance": lambda: acceptance().rsplit(" `dflash-plugin", 1)[0],
    },
    "docs/results.md": {
        "vllm-fair": lambda: fair(FAIR["vllm"]),
        "sglang-fair": lambda: fair(FAIR["sglang"]),
        "vllm-default": lambda: serving(FAIR["vllm"]),
        "sglang-short-blocks": lambda: fair("sglang-h200-qwen3-8b-short-blocks"),
        "sglang-whole-blocks": lambda: fair("sglang-h200-qwen3-8b-whole-blocks"),
        "vllm-profile": lambda: serving("vllm-h200-qwen3-8b-profile-8192"),
        "vllm-options": lambda: fair("vllm-h200-qwen3-8b-fair"),
        "sglang-options": lambda: fair("sglang-h200-qwen3-8b-fair"),
        "sglang-default": lambda: serving(FAIR["sglang"]),
        "sglang-long": lambda: serving("sglang-h200-qwen3-8b-long"),
        "sglang-prompts": lambda: timelines(FAIR["sglang"], "plugin"),
        "sglang-h200-timelines": lambda: timelines("sglang-h200-qwen3-8b-long", "plugin"),
        "acceptance": acceptance,
        "dflash2-greedy": dflash2_greedy,
        "greedy-texts": greedy_texts,
        "draft-weights": draft_weights,
        "h200": lambda: engine("transformers-h200"),
        "cpu": lambda: engine("transformers-cpu"),
        **REPLAYS,
        "vllm-qwen3-8b": lambda: serving("vllm-h100-qwen3-8b"),
        "vllm-h100": lambda: serving("vllm-h100-smollm2", ALONE_AND_TWO),
        "vllm-cpu": lambda: serving("vllm-cpu"),
        "vllm-soak": lambda: soak("vllm-soak-cpu", "vLLM", "preempted"),
        "sglang-qwen3-8b": lambda: serving("sglang-h100-qwen3-8b"),
        "sglang-timelines": lambda: timelines("sglang-h100-timelines"),
        "sglang-h100": lambda: serving("sglang-h100"),
        "sglang-soak": lambda: soak("sglang-soak-cpu", "SGLang", "retracted"),
        "sglang-soak-short": lambda: soak("sglang-soak-short-cpu", "SGLang", "retracted"),
    },
    "docs/design.md": {
        "kernels": lambda: kernels("kernels-h100"),
        "budget": lambda: budget("budget-simulator"),
    },
    "docs/vllm.md": {"cache-groups": cache_groups, "cached-prefixes": cached_prefixes},
    "docs/targets.md": {"targets": targets, "refusals": refusals},
    "docs/tuning.md": {
        "draft-sampling": draft_sampling,
        "sampled-tau": sampled_tau,
        "sglang-sampling": sglang_sampling,
    },
    "docs/trees.md": {
        "trees-gain": lambda: trees_gain("trees-cpu"),
        "trees-cpu": lambda: trees_speed("trees-cpu"),
        "trees-gpu": lambda: trees_speed("trees-h200"),
    },
    "docs/adaptive.md": {
        "vllm-adaptive": lambda: serving("vllm-h200-smollm2"),
        "sglang-adaptive": lambda: serving("sglang-h200-smollm2"),
        "sglang-texts": lambda: serving("sglang-h200-qwen3-8b-replay-texts"),
        "mixed": lambda: mixed("budget-simulator"),
    },
    "docs/dflash2.md": {
        "dflash2": lambda: dflash2("smollm2-dflash2-acceptance"),
        "dflash2-mixed": lambda: dflash2("smollm2-dflash2-mixed-acceptance"),
        "dflash2-temperature": dflash2_by_temperature,
        "first-draft": first_draft,
        "draft-step": draft_step,
        "dflash2-kernels": lambda: kernels("kernels-h200-dflash2", SHOWN_OF_DFLASH2),
    },
}


def filled(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """Text with every section between its markers made anew."""
    for name, make in sections.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = before + start + make() + "\n" + end + rest.split(end, 1)[1]
    return text


def main() -> None:
    for name, sections in SECTIONS.items():
        path = ROOT / name
        text = path.read_text()
        if "--check" not in sys.argv:
            path.write_text(filled(text, sections))
        elif filled(text, sections) != text:
            sys.exit(f"{name} is not up to date: run python tools/make_tables.py")


if __name__ == "__main__":
    main()
