"""One self-contained HTML page of measurements: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from statistics import geometric_mean

from dflash_plugin.bench.charts import Line, line_chart
from dflash_plugin.bench.schema import Cell, KeptText, Record, Role, Server
from dflash_plugin.errors import DFlashError

COLUMNS = {
    "in flight": "Requests that the client keeps under way; when one ends, the next is sent.",
    "tokens/s": "Output tokens of all requests per second of wall time, prompts included; the "
    "median of the runs.",
    "speedup": "Tokens/s over those of the baseline, which ran the same prompts in turns.",
    "per user": "Tokens/s that one reader sees once the answer has begun: 1 / median TPOT.",
    "per GPU": "Tokens/s divided by the GPUs of the server.",
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
    text = (
        f"<p><strong>{escape(label)}</strong>: {escape(server.engine)} "
        f"{escape(server.version or '')}, {escape(_model(server))} on "
        f"{escape(_machine(server))}, {escape(record.created[:10])}, at most "
        f"{settings.max_tokens} tokens an answer, temperature {settings.temperature:g}.</p>"
    )
    if not record.complete:
        text += (
            f'<p class="warn">{escape(label)} was stopped before its end: cells are missing, or '
            "have fewer runs than asked for.</p>"
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


def _model(server: Server) -> str:
    return server.model.rstrip("/").rsplit("/", 1)[-1]


def _machine(server: Server) -> str:
    name = server.gpu or "an unnamed machine"
    return f"{server.gpus} × {name}" if server.gpus > 1 else name


def _sets(record: Record) -> list[str]:
    return list(dict.fromkeys(cell.set_name for cell in record.cells))


def _levels(record: Record, role: Role = "measured") -> list[int]:
    return sorted({cell.concurrency for cell in record.cells if cell.role == role})


def speedup(record: Record, cell: Cell) -> float | None:
    """Tokens/s of a cell over the baseline's, or None where that is missing."""
    alone = record.cell("baseline", cell.set_name, cell.concurrency)
    if alone is None or not alone.tokens_per_second:
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
    levels = _levels(record)
    if not levels:
        return ""
    few, many = levels[0], levels[-1]
    gains = [
        (mean_over_sets(record, n, lambda cell: speedup(record, cell)) or 0, n) for n in levels
    ]
    best, at = max(gains)
    tau = mean_over_sets(record, few, lambda cell: cell.tau.pooled)
    first = mean_over_sets(record, few, _first_draft)
    user = mean_over_sets(record, few, lambda cell: cell.per_user)
    every = mean_over_sets(record, many, lambda cell: cell.tokens_per_second)
    gpus = record.servers[0].gpus
    numbers = [
        (
            best,
            f"{best:.2f}×",
            f"With {at} in flight this server writes {best:.2f} times as many tokens a second as "
            "the baseline (geometric mean over the sets), which is the most of all concurrencies.",
        ),
        (
            tau,
            f"τ {tau:.2f}" if tau else "",
            "A verify pass commits so many tokens on average (geometric mean over the sets), the "
            f"target's own bonus token included, with {few} in flight; without a drafter it is 1.",
        ),
        (
            first,
            f"{first:.0%}" if first else "",
            "So many of the verify passes accept the first draft; a later draft counts only if all "
            "before it are accepted.",
        ),
        (
            user,
            f"{user:,.1f} tokens/s" if user else "",
            f"So fast one reader sees an answer grow with {few} in flight, once it has begun.",
        ),
        (
            every,
            f"{every:,.1f} tokens/s" if every else "",
            f"So much the server writes for all readers together with {many} in flight, "
            + ("on one device." if gpus == 1 else f"on {gpus} devices."),
        ),
    ]
    cards = [_card(label, number, sentence) for value, number, sentence in numbers if value]
    return f'<div class="grid">{"".join(cards)}</div>'


def _first_draft(cell: Cell) -> float | None:
    return cell.acceptance.unconditional[0] if cell.acceptance.unconditional else None


def _card(label: str, number: str, sentence: str) -> str:
    return (
        f'<div class="card"><h3>{escape(label)}</h3><div class="number">{escape(number)}</div>'
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
    """Speedup, and one user against the GPU, of one set or of the mean over all."""
    gains, trades = [], []
    for color, (label, record) in enumerate(runs):
        gains.append(_gain_line(label, record, only, color))
        trades += [_trade_line(label, record, server, only, color) for server in record.servers]
    gains = [line for line in gains if line.points]
    trades = [line for line in trades if line.points]
    where = "geometric mean over the sets" if only is None else only
    return _figure(
        "Speedup against concurrency",
        line_chart(gains, "requests in flight", "speedup", powers=True, level=1.0),
        f"How many times the baseline's tokens/s the server writes ({where}); below the dotted "
        "line at 1 drafting costs more than it gains."
        if gains
        else "A speedup needs a baseline: measure with --baseline URL.",
    ) + _figure(
        "One user against the GPU",
        line_chart(trades, "tokens/s of one user", "tokens/s of one GPU"),
        f"What a reader sees against what a GPU writes in all ({where}); the numbers at the points "
        "are requests in flight, and further up and to the right is better.",
    )


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
            shares.append(_positions(cell.set_name, cell.acceptance.unconditional or [], color))
            given.append(_positions(cell.set_name, cell.acceptance.conditional or [], color))
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
                "The same among passes that accepted all earlier drafts: how good the drafter is "
                "at each position when what it builds on is right.",
            )
        )
    return f'<h2>Acceptance by position</h2><div class="grid wide">{"".join(figures)}</div>'


def _first_accepting(record: Record, name: str) -> Cell | None:
    cells = (record.cell("measured", name, n) for n in _levels(record))
    return next((cell for cell in cells if cell and cell.acceptance.unconditional), None)


def _positions(name: str, shares: Sequence[float | None], color: int) -> Line:
    points = [(float(k), share) for k, share in enumerate(shares, start=1) if share is not None]
    return Line(name, points, color)


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
    for place, one in enumerate(text.passes, start=1):
        rejected = one.rejected or []
        title = f"pass {place}: {len(one.accepted)} accepted"
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
            text += f", {server.model}, {_machine(server)}"
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
