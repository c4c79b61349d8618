"""A live view of a server's speculation, from its Prometheus metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dflash_plugin.monitor.client import MetricsSnapshot, ServerClient, ServerError, grown

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 60
WIDTH = 24


@dataclass(frozen=True)
class Rates:
    """What happened between two scrapes. None where it is not exported or nothing happened.

    Attributes:
        tokens_per_second: output tokens.
        tau: tokens committed per verify pass; the engine's own gauge where nothing is counted.
        by_position: share of the passes that accepted the draft at each position.
        hit_rate: share of the prompt tokens that came from the prefix cache.
        verified, saved: drafts, under adaptive verification.
        steps: by rows of a request.
        warnings: since the first scrape, or since the server started again.
        restarted: whether a counter fell, as when a server starts again.
    """

    tokens_per_second: float | None = None
    tau: float | None = None
    by_position: tuple[float, ...] = ()
    hit_rate: float | None = None
    verified: float | None = None
    saved: float | None = None
    steps: Mapping[int, float] | None = None
    warnings: float | None = None
    restarted: bool = False


def between(before: MetricsSnapshot, after: MetricsSnapshot, seconds: float) -> Rates:
    """What two scrapes, ``seconds`` apart, tell."""
    restarted = _restarted(before, after)
    if restarted:
        before = MetricsSnapshot(engine=after.engine)
    passes = grown(before.passes, after.passes)
    accepted = {
        position: count - before.accepted.get(position, 0.0)
        for position, count in after.accepted.items()
    }
    generated = grown(before.generated, after.generated)
    prompt = grown(before.prompt_tokens, after.prompt_tokens)
    cached = grown(before.cached_tokens, after.cached_tokens)
    steps = {
        rows: count - before.steps.get(rows, 0.0)
        for rows, count in after.steps.items()
        if count > before.steps.get(rows, 0.0)
    }
    # What a server has generated since it started again took another time than ``seconds``.
    counted = generated is not None and seconds > 0 and not restarted
    tau = 1 + sum(accepted.values()) / passes if passes else None
    return Rates(
        tokens_per_second=(generated or 0.0) / seconds if counted else after.tokens_per_second,
        tau=after.length if after.passes is None else tau,
        by_position=tuple(accepted[p] / passes for p in sorted(accepted)) if passes else (),
        hit_rate=(cached or 0.0) / prompt if prompt and cached is not None else None,
        verified=grown(before.verified, after.verified),
        saved=grown(before.saved, after.saved),
        steps=steps,
        warnings=grown(before.warnings, after.warnings),
        restarted=restarted,
    )


def _restarted(before: MetricsSnapshot, after: MetricsSnapshot) -> bool:
    pairs = [
        (before.generated, after.generated),
        (before.passes, after.passes),
        (before.prompt_tokens, after.prompt_tokens),
    ]
    return any(a is not None and b is not None and b < a for a, b in pairs)


def sparkline(values: list[float], low: float, high: float) -> str:
    """One character a value, from ``low`` to ``high``."""
    if not values:
        return ""
    span = max(high - low, 1e-9)
    steps = len(BARS) - 1
    return "".join(BARS[round(min(max((v - low) / span, 0.0), 1.0) * steps)] for v in values)


def bar(share: float, width: int = WIDTH) -> str:
    """A horizontal bar of a share in [0, 1]."""
    return "█" * round(min(max(share, 0.0), 1.0) * width)


class View:
    """What is on the screen.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.taus: deque[float] = deque(maxlen=HISTORY)
        self.reading: MetricsSnapshot | None = None
        self.rates: Rates | None = None
        self.trouble: str | None = None
        self._at = 0.0

    def take(self, reading: MetricsSnapshot, now: float) -> None:
        """Add a scrape made at ``now``, in seconds."""
        if self.reading is not None:
            self.rates = between(self.reading, reading, now - self._at)
            if self.rates.tau is not None:
                self.taus.append(self.rates.tau)
        self.reading, self._at, self.trouble = reading, now, None

    def fail(self, message: str) -> None:
        """Say why there is no scrape; what was there stays."""
        self.trouble = message

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self.trouble is not None:
            parts.append(Text(f"{self.trouble}; trying again", style="red"))
        if self.reading is not None:
            parts.append(self._engine(self.reading, self.rates or Rates()))
            parts += self._speculation(self.reading, self.rates or Rates())
        title = self.url
        if self.reading is not None and self.reading.engine is not None:
            title = f"{self.reading.engine} at {self.url}"
        return Panel(Group(*parts), title=title, title_align="left")

    def _engine(self, reading: MetricsSnapshot, rates: Rates) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        hit_rate = reading.hit_rate if rates.hit_rate is None else rates.hit_rate
        rows = {
            "requests": f"{_number(reading.running)} running, {_number(reading.waiting)} waiting",
            "tokens/s": _number(rates.tokens_per_second),
            "KV cache": _percent(reading.kv_usage, "in use"),
            "prefix cache": _percent(hit_rate, "of prompt tokens"),
        }
        for name, value in rows.items():
            table.add_row(name, value)
        if rates.restarted:
            table.add_row("", Text("counters began anew: the server was restarted", style="yellow"))
        return table

    def _speculation(self, reading: MetricsSnapshot, rates: Rates) -> list[RenderableType]:
        now = reading.tau if rates.tau is None else rates.tau
        if now is None:
            return [Text(_absent(reading), style="yellow")]
        top = max([now, reading.expected or 0.0, *self.taus])
        line = sparkline(list(self.taus), 1.0, top)
        table = Table.grid(padding=(0, 2))
        expected = f", {reading.expected:.2f} expected" if reading.expected else ""
        table.add_row("τ", f"{now:.2f}{expected}", line)
        shown = rates.by_position or tuple(reading.rates)
        for position, share in enumerate(shown, start=1):
            table.add_row(f"at {position}", f"{share:.2f}", bar(share))
        found: list[RenderableType] = [table]
        if not shown:
            found.append(Text(_no_positions(reading), style="yellow"))
        found += _adaptive(reading, rates)
        if reading.warnings:
            count = int(reading.warnings)
            text = f"{count} warning{'s' if count > 1 else ''}: acceptance far below the record"
            found.append(Text(f"{text}; `dflash-plugin doctor --server` looks for why", "yellow"))
        return found


def _absent(reading: MetricsSnapshot) -> str:
    if reading.engine == "sglang":
        return "no speculation is counted: start SGLang with --speculative-algorithm DFLASH"
    if reading.passes is not None:
        return "nothing has been verified yet"
    return "no speculation is counted: start vLLM with --speculative-method dflash"


def _no_positions(reading: MetricsSnapshot) -> str:
    if reading.engine == "sglang" and reading.passes is None:
        return "acceptance by position comes with dflash-plugin in SGLang's environment"
    return "nothing has been verified yet"


def _adaptive(reading: MetricsSnapshot, rates: Rates) -> list[RenderableType]:
    """Drafts and steps under adaptive verification; nothing without it."""
    if reading.verified is None:
        return []
    verified, saved = rates.verified or 0.0, rates.saved or 0.0
    if verified + saved == 0:
        verified, saved = reading.verified, reading.saved or 0.0
    table = Table.grid(padding=(0, 2))
    total = verified + saved
    share = f"{saved / total:.0%} saved" if total else ""
    table.add_row("drafts", f"{verified:,.0f} verified", share)
    steps = rates.steps or reading.steps
    count = sum(steps.values())
    for rows, number in sorted(steps.items()):
        table.add_row(f"{rows} rows", f"{number / count:.0%}", bar(number / count))
    return [Text("adaptive verification"), table]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(value: float | None, what: str) -> str:
    return "–" if value is None else f"{value:.0%} {what}"


def watch(
    client: ServerClient,
    interval: float,
    once: bool,
    show: Callable[[View], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> View:
    """Scrape and show until interrupted.

    Args:
        client: of the server.
        interval: seconds between two scrapes.
        once: end after two scrapes, without a live display.
        show: called with the view after each scrape; the terminal's live display when None.
        sleep, clock: the time's.

    Returns:
        The view, which renders itself.

    Raises:
        ServerError: with ``once``, the server does not answer.
    """
    view = View(client.url)
    if once:
        for number in range(2):
            if number:
                sleep(interval)
            view.take(client.reading(), clock())
        return view
    if show is not None:
        _follow(client, view, interval, show, sleep, clock)
        return view
    with Live(view, auto_refresh=False, screen=True) as live:
        _follow(client, view, interval, lambda _: live.refresh(), sleep, clock)
    return view


def _follow(
    client: ServerClient,
    view: View,
    interval: float,
    show: Callable[[View], None],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    try:
        while True:
            try:
                view.take(client.reading(), clock())
            except ServerError as error:
                view.fail(str(error))
            show(view)
            sleep(interval)
    except KeyboardInterrupt:
        return
