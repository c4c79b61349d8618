"""One self-contained HTML page of measurements: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from statistics import geometric_mean

from dflash_plugin.bench.schema import Cell, KeptText, Record, Role, Server
from dflash_plugin.bench.speculation import drafter_of, method_of, pair_of
from dflash_plugin.charts import Line, line_chart
from dflash_plugin.errors import DFlashError

COLUMNS = {
    "in flight": "Requests that the client keeps under way; when one ends, the next is sent.",
    "tokens/s": "Output tokens of all requests per second of wall time, prompts included; the "
    "median of the runs.",
    "speedup": "Tokens/s over those of the baseline, which ran the same prompts in turns.",
    "per reader": "Tokens/s that one reader sees once the answer has begun: 1 / median TPOT.",
    "per device": "Tokens/s divided by the GPUs, or other devices, that the server runs on.",
    "τ pooled": "Tokens committed per verify pass over all passes: every pass weighs the same.",
    "τ mean": "The mean of each request's own τ: every request weighs the same.",
    "τ by tokens": "The mean of each request's τ weighted by its tokens: long answers weigh more.",
    "TTFT": "Milliseconds from sending a request to its first token, at the 50th, 90th and 99th "
    "percentile.",
    "TPOT": "Milliseconds per token after the first chunk of an answer, at the same percentiles of "
    "requests.",
    "counts": "Whether tokens and verify passes counted from the answers equal those by which the "
    "server's own counters grew.",
}


def page(records: Sequence[Record]) -> str:
    """The page.

    Args:
        records: side by side, in this order.

    Raises:
        DFlashError: none of them holds a cell.
    """
    if not any(record.cells for record in records):
        raise DFlashError("the results hold no cell: let `dflash-plugin bench` finish at least one")
    labels = _labels(records)
    runs = list(zip(labels, records, strict=True))
    style = files("dflash_plugin.bench").joinpath("report.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(', '.join(labels))}</title>",
            f"<style>\n{style}</style></head><body>",
            "<h1>Speculative decoding, measured</h1>",
            *(_introduction(label, record) for label, record in runs),
            "<h2>In short</h2>",
            *(_headlines(label, record) for label, record in runs),
            _speeds(runs),
            _acceptance(runs),
            _tables(runs),
            _viewer(runs),
            _circumstances(runs),
            "</body></html>\n",
        ]
    )


def _labels(records: Sequence[Record]) -> list[str]:
    """Names of the records, numbered where two are the same."""
    labels: list[str] = []
    for record in records:
        same = sum(other.label == record.label for other in records[: len(labels)])
        labels.append(record.label + (f" ({same + 1})" if same else ""))
    return labels


def _introduction(label: str, record: Record) -> str:
    settings, server = record.settings, record.servers[0]
    engine = f"{server.engine} {server.version or ''}".strip()
    named = "" if label == engine else f"{escape(engine)}, "
    text = (
        f"<p><strong>{escape(label)}</strong>: {named}{escape(pair_of(server))} on "
        f"{escape(_machine(server))}, {escape(record.created[:10])}, at most "
        f"{settings.max_tokens} tokens an answer, temperature {settings.temperature:g}."
    )
    baseline = record.server("baseline")
    if baseline is not None:
        text += f" The baseline is {escape(pair_of(baseline))}."
    text += "</p>"
    if not record.complete:
        text += (
            f'<p class="warn">{escape(label)} was stopped before its end: cells are missing, or '
            "have fewer runs than asked for, or a run with fewer requests.</p>"
        )
    differ = [
        f"{cell.set_name} ×{cell.concurrency} ({cell.role})"
        for cell in record.cells
        if any(check.agrees is False for repeat in cell.repeats for check in repeat.checks)
    ]
    if differ:
        text += (
            f'<p class="warn">{escape(label)}: the server counted otherwise than the client in '
            f"{escape(', '.join(differ))}; somebody else may have used it.</p>"
        )
    busy = [
        repeat.client_busy for cell in record.cells for repeat in cell.repeats if repeat.client_busy
    ]
    if busy and max(busy) > 0.8:
        text += (
            f'<p class="warn">{escape(label)}: the client was busy for {max(busy):.0%} of a run, '
            "so it may have been the client that was measured.</p>"
        )
    return text


def device_of(server: Server) -> str:
    """What the server runs on, in one word: GPU, CPU or, where that is not known, device."""
    flags = server.flags if isinstance(server.flags, dict) else {}
    if flags.get("device") == "cpu" or re.search(r", \d+ cores$", server.gpu or ""):
        return "CPU"
    return "GPU" if server.gpu else "device"


def _devices_of(servers: Iterable[Server]) -> str:
    kinds = {device_of(server) for server in servers}
    return kinds.pop() if len(kinds) == 1 else "device"


def _machine(server: Server) -> str:
    name = server.gpu or "an unnamed machine"
    return f"{server.gpus} × {name}" if server.gpus > 1 else name


def _sets(record: Record) -> list[str]:
    return list(dict.fromkeys(cell.set_name for cell in record.cells))


def _levels(record: Record, role: Role = "measured") -> list[int]:
    return sorted({cell.concurrency for cell in record.cells if cell.role == role})


def speedup(record: Record, cell: Cell) -> float | None:
    """Tokens/s of a cell over the baseline's; None where that is missing or was interrupted."""
    alone = record.cell("baseline", cell.set_name, cell.concurrency)
    if alone is None or not alone.tokens_per_second:
        return None
    # Only the last run can be interrupted. Where it is the first, it answered fewer prompts.
    if cell.repeats[0].requests != alone.repeats[0].requests:
        return None
    return cell.tokens_per_second / alone.tokens_per_second


def mean_over_sets(
    record: Record,
    level: int,
    read: Callable[[Cell], float | None],
    role: Role = "measured",
    only: str | None = None,
) -> float | None:
    """Geometric mean over all sets, or one set's own value; None where one is missing."""
    names = _sets(record) if only is None else [only]
    cells = [record.cell(role, name, level) for name in names]
    values = [read(cell) if cell else None for cell in cells]
    known = [value for value in values if value]
    return geometric_mean(known) if known and len(known) == len(values) else None


def _headlines(label: str, record: Record) -> str:
    """Cards of the smallest and the largest concurrency, each headed by what it shows."""
    levels = _levels(record)
    if not levels:
        return ""
    few, many = levels[0], levels[-1]
    tau = mean_over_sets(record, few, lambda cell: cell.tau.pooled)
    first = mean_over_sets(record, few, _first_draft)
    reader = mean_over_sets(record, few, lambda cell: cell.per_user)
    total = mean_over_sets(record, many, lambda cell: cell.tokens_per_second)
    server = record.servers[0]
    device = device_of(server)
    where = f"one {device}" if server.gpus == 1 else f"{server.gpus} {device}s"
    cards = [_speedup_card(record)]
    if tau:
        cards.append(
            _card(
                f"Acceptance length, {few} in flight",
                f"τ {tau:.2f}",
                "Tokens that a verify pass commits on average (geometric mean over the sets), the "
                "target's own bonus token included. Without a drafter it is 1.",
            )
        )
    if first:
        cards.append(
            _card(
                f"First draft accepted, {few} in flight",
                f"{first:.0%}",
                "Share of the verify passes that accept the first draft. A later draft counts "
                "only if all before it are accepted.",
            )
        )
    if reader:
        cards.append(
            _card(
                f"One reader, {few} in flight",
                f"{reader:,.1f} tokens/s",
                "Speed at which one reader sees an answer grow, once it has begun.",
            )
        )
    if total:
        cards.append(
            _card(
                f"All readers, {many} in flight",
                f"{total:,.1f} tokens/s",
                f"Tokens that the server writes for all readers together, on {where}.",
            )
        )
    return f'<h3>{escape(label)}</h3><div class="grid">{"".join(cards)}</div>'


def _speedup_card(record: Record) -> str:
    """Speedup at the smallest and the largest concurrency, and its range over all."""
    found = {
        n: mean_over_sets(record, n, lambda cell: speedup(record, cell)) for n in _levels(record)
    }
    gains = {level: gain for level, gain in found.items() if gain}
    if not gains:
        return ""
    ends = list(dict.fromkeys((min(gains), max(gains))))
    sentence = (
        "Tokens a second over those of the baseline, which ran the same prompts in turns "
        "(geometric mean over the sets)."
    )
    if len(gains) > 2:
        best = max(gains, key=lambda level: gains[level])
        worst = min(gains, key=lambda level: gains[level])
        sentence += (
            f" Over {len(gains)} concurrencies it is {gains[worst]:.2f}× ({worst} in flight) to "
            f"{gains[best]:.2f}× ({best} in flight)."
        )
    return _card(
        f"Speedup, {' and '.join(map(str, ends))} in flight",
        " and ".join(f"{gains[level]:.2f}×" for level in ends),
        sentence,
    )


def _first_draft(cell: Cell) -> float | None:
    return cell.acceptance.unconditional[0] if cell.acceptance.unconditional else None


def _card(title: str, number: str, sentence: str) -> str:
    return (
        f'<div class="card"><h3>{escape(title)}</h3><div class="number">{escape(number)}</div>'
        f"<p>{escape(sentence)}</p></div>"
    )


def _figure(title: str, chart: str, sentence: str) -> str:
    return (
        f'<figure class="card"><h3>{escape(title)}</h3>{chart}'
        f"<figcaption>{escape(sentence)}</figcaption></figure>"
    )


def _speeds(runs: Sequence[tuple[str, Record]]) -> str:
    names = list(dict.fromkeys(name for _, record in runs for name in _sets(record)))
    charts = _speed_charts(runs, None)
    more = ""
    if len(names) > 1:
        inner = "".join(
            f'<h3>{escape(name)}</h3><div class="grid wide">{_speed_charts(runs, name)}</div>'
            for name in names
        )
        more = f"<details><summary>Speed on each set</summary>{inner}</details>"
    return f'<h2>Speed</h2><div class="grid wide">{charts}</div>{more}'


def _speed_charts(runs: Sequence[tuple[str, Record]], only: str | None) -> str:
    """Speedup, and one reader against all, of one set or of the mean over all."""
    gains, trades = [], []
    for color, (label, record) in enumerate(runs):
        gains.append(_gain_line(label, record, only, color))
        trades += [_trade_line(label, record, server, only, color) for server in record.servers]
    gains = [line for line in gains if line.points]
    trades = [line for line in trades if line.points]
    where = "geometric mean over the sets" if only is None else only
    device = _devices_of(server for _, record in runs for server in record.servers)
    return _figure(
        "Speedup against concurrency",
        line_chart(gains, "requests in flight", "speedup", powers=True, level=1.0),
        f"How many times the baseline's tokens/s the server writes ({where}); below the dotted "
        f"line at 1 {_below_one(runs)}."
        if gains
        else "A speedup needs a baseline: measure with --baseline URL.",
    ) + _figure(
        f"One reader against the whole {device}",
        line_chart(trades, "tokens/s of one reader", f"tokens/s of one {device}"),
        f"What one reader sees against what a {device} writes in all ({where}); the numbers at the "
        "points are requests in flight, and further up and to the right is better.",
    )


def _below_one(runs: Sequence[tuple[str, Record]]) -> str:
    """What a speedup below 1 means, by what the baselines are."""
    baselines = [record.server("baseline") for _, record in runs]
    if any(server is not None and server.speculative is not False for server in baselines):
        return "the baseline is faster"
    return "drafting costs more than it gains"


def _gain_line(label: str, record: Record, only: str | None, color: int) -> Line:
    gains = {
        n: mean_over_sets(record, n, lambda cell: speedup(record, cell), only=only)
        for n in _levels(record)
    }
    return Line(label, [(float(n), gain) for n, gain in gains.items() if gain], color)


def _trade_line(label: str, record: Record, server: Server, only: str | None, color: int) -> Line:
    role, points, levels = server.role, [], []
    for n in _levels(record, role):
        user = mean_over_sets(record, n, lambda cell: cell.per_user, role, only)
        total = mean_over_sets(record, n, lambda cell: cell.tokens_per_second, role, only)
        if user and total:
            points.append((user, total / server.gpus))
            levels.append(str(n))
    baseline = role == "baseline"
    return Line(f"{label}, baseline" if baseline else label, points, color, baseline, levels)


def _acceptance(runs: Sequence[tuple[str, Record]]) -> str:
    figures = []
    for label, record in runs:
        found = [
            cell
            for name in _sets(record)
            if (cell := _first_accepting(record, name)) and cell.acceptance.unconditional
        ]
        if not found:
            reasons = {c.acceptance.source for c in record.cells if c.role == "measured"}
            figures.append(
                f'<div class="card"><h3>{escape(label)}</h3><p>No acceptance by position: '
                f"{escape('; '.join(sorted(reasons)))}.</p></div>"
            )
            continue
        level = found[0].concurrency
        shares, given = [], []
        for color, cell in enumerate(found):
            shares.append(_positions(cell, color, conditional=False))
            given.append(_positions(cell, color, conditional=True))
        figures.append(
            _figure(
                f"{label}: accepted at position k",
                line_chart(shares, "position of the draft", "share of passes", whole=True, top=1),
                f"The share of verify passes that accept the draft at each position and so all "
                f"before it, with {level} in flight; the shares of a set and 1 for the bonus token "
                "add up to about its τ.",
            )
        )
        figures.append(
            _figure(
                f"{label}: accepted if all before it were",
                line_chart(given, "position of the draft", "share of passes", whole=True, top=1),
                "The same among the passes that accepted all earlier drafts: how good the drafter "
                "is at each position when what it builds on is right. Their number n falls from "
                "position to position; few passes tell little.",
            )
        )
    return f'<h2>Acceptance by position</h2><div class="grid wide">{"".join(figures)}</div>'


def _first_accepting(record: Record, name: str) -> Cell | None:
    cells = (record.cell("measured", name, n) for n in _levels(record))
    return next((cell for cell in cells if cell and cell.acceptance.unconditional), None)


def _positions(cell: Cell, color: int, *, conditional: bool) -> Line:
    """A set's rates by position, with the number of passes behind each of them."""
    every = cell.acceptance.unconditional or []
    rates: Sequence[float | None] = (cell.acceptance.conditional or []) if conditional else every
    reached = [1.0, *every[:-1]] if conditional else [1.0] * len(every)
    points, notes, counts = [], [], []
    for position, (rate, share) in enumerate(zip(rates, reached, strict=True), start=1):
        if rate is None:
            continue
        points.append((float(position), rate))
        if cell.passes is not None:
            counts.append(round(share * cell.passes))
            notes.append(f"n = {counts[-1]:,}")
    name = cell.set_name
    if counts:
        last = f" to {counts[-1]:,}" if counts[-1] != counts[0] else ""
        name += f", n = {counts[0]:,}{last} passes"
    return Line(name, points, color, notes=notes)


def _tables(runs: Sequence[tuple[str, Record]]) -> str:
    parts = ["<h2>Every set</h2>"]
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("set", *COLUMNS))
    for label, record in runs:
        rows = "".join(_row(record, cell) for cell in _ordered(record))
        parts.append(
            f"<h3>{escape(label)}</h3>"
            f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>{_reasons(record)}'
        )
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in COLUMNS.items()
    )
    return "".join([*parts, f"<dl>{terms}</dl>"])


def _ordered(record: Record) -> list[Cell]:
    names = _sets(record)
    return sorted(
        record.cells,
        key=lambda cell: (names.index(cell.set_name), cell.concurrency, cell.role == "baseline"),
    )


def _row(record: Record, cell: Cell) -> str:
    server = record.server(cell.role)
    gain = speedup(record, cell) if cell.role == "measured" else None
    agree = [check.agrees for repeat in cell.repeats for check in repeat.checks]
    counts = "differ" if False in agree else "agree" if True in agree else "untold"
    name = cell.set_name + (" (baseline)" if cell.role == "baseline" else "")
    values = [
        name,
        str(cell.concurrency),
        f"{cell.tokens_per_second:,.1f}",
        _shown(gain, "{:.2f}×"),
        _shown(cell.per_user, "{:,.1f}"),
        f"{cell.tokens_per_second / (server.gpus if server else 1):,.1f}",
        _shown(cell.tau.pooled),
        _shown(cell.tau.mean_per_request),
        _shown(cell.tau.token_weighted),
        _spread(cell.ttft_ms),
        _spread(cell.tpot_ms),
    ]
    cells = "".join(f"<td>{escape(value)}</td>" for value in values)
    bad = ' class="bad"' if counts == "differ" else ""
    return f"<tr>{cells}<td{bad}>{counts}</td></tr>"


def _shown(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def _spread(found: object) -> str:
    values = [getattr(found, name, None) for name in ("p50", "p90", "p99")]
    return "–" if None in values else " / ".join(f"{value:,.1f}" for value in values)


def _reasons(record: Record) -> str:
    """Why averages are missing, and by what the counts were checked."""
    names = {"pooled": "τ pooled", "mean_per_request": "τ mean", "token_weighted": "τ by tokens"}
    reasons: dict[str, None] = {}
    for cell in record.cells:
        for field, name in names.items():
            if getattr(cell.tau, field) is None and cell.role == "measured":
                reasons[f"No {name}: {cell.tau.sources[field]}."] = None
        for repeat in cell.repeats:
            for check in repeat.checks:
                if cell.role == "measured":
                    reasons[f"{check.what.capitalize()} are checked by {check.note}."] = None
    return "".join(f'<p class="note">{escape(reason)}</p>' for reason in list(reasons)[:12])


def _viewer(runs: Sequence[tuple[str, Record]]) -> str:
    kept = [(label, text) for label, record in runs for text in record.texts if text.passes]
    if not kept:
        return (
            "<h2>Answers by pass</h2><p>None were kept: measure with --keep-text N to read N "
            "answers of each set here.</p>"
        )
    key = (
        '<p class="key"><span class="a">accepted draft</span><span class="b">bonus token</span>'
        '<span class="r">rejected draft</span> A line before a word begins a verify pass; plain '
        "text comes from the prompt's own pass. Rejected drafts are shown where the engine tells "
        "them.</p>"
    )
    return (
        "<h2>Answers by pass</h2>" + key + "".join(_answer(*one, n) for n, one in enumerate(kept))
    )


def _answer(label: str, text: KeptText, number: int) -> str:
    accepted = sum(len(one.accepted) for one in text.passes)
    tokens = accepted + sum(one.bonus is not None for one in text.passes)
    summary = (
        f"{label}{', baseline' if text.role == 'baseline' else ''}: {text.prompt_id}, turn "
        f"{text.turn + 1}: {tokens} tokens in {len(text.passes)} passes, "
        f"τ {tokens / len(text.passes):.2f}"
    )
    spans = [escape("".join(text.first))]
    for number_of_pass, one in enumerate(text.passes, start=1):
        rejected = one.rejected or []
        title = f"pass {number_of_pass}: {len(one.accepted)} accepted"
        if one.rejected is not None:
            title += f", {len(rejected)} rejected"
        inner = "".join(f'<span class="a">{_token(token)}</span>' for token in one.accepted)
        inner += "".join(f'<span class="r">{_token(token, "↵")}</span>' for token in rejected)
        if one.bonus is not None:
            inner += f'<span class="b">{_token(one.bonus)}</span>'
        spans.append(f'<span class="pass" title="{escape(title)}">{inner}</span>')
    doubt = "" if text.exact else " A chunk may hold several passes."
    return (
        f'<details class="card"{" open" if number == 0 else ""}><summary>{escape(summary)}'
        f"</summary><pre>{escape(text.prompt)}</pre>"
        f'<div class="viewer">{"".join(spans)}</div>'
        f'<p class="note">{escape(text.note)}.{doubt}</p></details>'
    )


def _token(text: str, line_break: str = "↵\n") -> str:
    """A token as HTML; a line break can be seen, and breaks the line where it was written."""
    return escape(text).replace("\n", line_break)


def _circumstances(runs: Sequence[tuple[str, Record]]) -> str:
    parts = ["<h2>How it was measured</h2>"]
    for label, record in runs:
        settings = record.settings
        rows = {
            "command": record.command,
            "begun": record.created,
            "client": f"{record.client}, dflash-plugin {record.plugin_version}",
            "commit": record.git_commit or "not in a checkout",
            "runs": f"{settings.repeats} of each cell, the servers in turns, the same prompts in "
            "the same order" + (", after a round to warm up" if settings.warmup else ""),
        }
        for server in record.servers:
            text = f"{server.engine} {server.version or '(version untold)'}"
            if server.plugin_version:
                text += f", dflash-plugin {server.plugin_version}"
            text += f", {server.model}"
            if server.speculative:
                option = "baseline" if server.role == "baseline" else "server"
                drafts = drafter_of(server) or method_of(server)
                text += f", drafter {drafts or f'(untold: give --{option}-command)'}"
            text += f", {_machine(server)}"
            if server.num_drafts:
                text += f", {server.num_drafts} drafts a pass"
            rows[server.role] = text + "".join(f"; {note}" for note in server.notes)
        items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows.items())
        parts.append(f"<h3>{escape(label)}</h3><dl>{items}</dl>")
        parts += [_flags(server) for server in record.servers if server.flags]
    return "".join(parts)


def _flags(server: Server) -> str:
    flags = server.flags
    if isinstance(flags, dict):
        flags = "\n".join(f"{key}: {value}" for key, value in flags.items())
    return (
        f"<details><summary>How the {server.role} server runs</summary>"
        f"<pre>{escape(flags or '')}</pre></details>"
    )
