"""A live view of a server's speculation, from its Prometheus metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dflash_plugin.monitor.client import ServerClient
from dflash_plugin.monitor.metrics import MetricsSnapshot, Rates, ServerError, rates_between

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 60
WIDTH = 24


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
    """What is known of a server, as a frame for a terminal, a line or JSON.

    Args:
        url: of the server, as it is shown.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.taus: deque[float] = deque(maxlen=HISTORY)
        self.snapshot: MetricsSnapshot | None = None
        self.rates: Rates | None = None
        self.error: str | None = None
        self._taken_at = 0.0

    def add(self, snapshot: MetricsSnapshot, now: float) -> None:
        """Add a scrape made at ``now``, in seconds."""
        if self.snapshot is not None:
            self.rates = rates_between(self.snapshot, snapshot, now - self._taken_at)
            if self.rates.tau is not None:
                self.taus.append(self.rates.tau)
        self.snapshot, self._taken_at, self.error = snapshot, now, None

    def fail(self, message: str) -> None:
        """Show why there is no new scrape beside what was scraped before."""
        self.error = message

    def as_json(self) -> dict[str, Any]:
        """The last scrape, and what happened since the one before."""
        return {
            "now": asdict(self.snapshot or MetricsSnapshot()),
            "since_last": asdict(self.rates or Rates()),
        }

    def line(self) -> str:
        """The last interval in one line, for a file or a pipe."""
        snapshot, rates = self.snapshot or MetricsSnapshot(), self.rates or Rates()
        tau = snapshot.tau if rates.tau is None else rates.tau
        hit_rate = snapshot.hit_rate if rates.hit_rate is None else rates.hit_rate
        expected = f" ({snapshot.expected:.2f} expected)" if snapshot.expected else ""
        parts = [
            f"{_number(snapshot.running)} running",
            f"{_number(snapshot.waiting)} waiting",
            f"{_number(rates.tokens_per_second)} tokens/s",
            "τ –" if tau is None else f"τ {tau:.2f}{expected}",
        ]
        if rates.by_position:
            parts.append("at 1.. " + " ".join(f"{share:.2f}" for share in rates.by_position))
        if snapshot.kv_usage is not None:
            parts.append(f"KV cache {snapshot.kv_usage:.0%}")
        if hit_rate is not None:
            parts.append(f"prefix cache {hit_rate:.0%}")
        if rates.saved_share is not None:
            parts.append(f"{rates.saved_share:.0%} of drafts saved")
        if rates.restarted:
            parts.append("the server was restarted")
        return ", ".join(parts)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self.error is not None:
            parts.append(Text(f"{self.error}; trying again", style="red"))
        if self.snapshot is not None:
            parts.append(self._engine(self.snapshot, self.rates or Rates()))
            parts += self._speculation(self.snapshot, self.rates or Rates())
        title = self.url
        if self.snapshot is not None and self.snapshot.engine is not None:
            title = f"{self.snapshot.engine} at {self.url}"
        return Panel(Group(*parts), title=title, title_align="left")

    def _engine(self, snapshot: MetricsSnapshot, rates: Rates) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        hit_rate = snapshot.hit_rate if rates.hit_rate is None else rates.hit_rate
        rows = {
            "requests": f"{_number(snapshot.running)} running, {_number(snapshot.waiting)} waiting",
            "tokens/s": _number(rates.tokens_per_second),
            "KV cache": _percent(snapshot.kv_usage, "in use"),
            "prefix cache": _percent(hit_rate, "of prompt tokens"),
        }
        for name, value in rows.items():
            table.add_row(name, value)
        if rates.restarted:
            table.add_row("", Text("counters began anew: the server was restarted", style="yellow"))
        return table

    def _speculation(self, snapshot: MetricsSnapshot, rates: Rates) -> list[RenderableType]:
        now = snapshot.tau if rates.tau is None else rates.tau
        if now is None:
            return [Text(_absent(snapshot), style="yellow")]
        top = max([now, snapshot.expected or 0.0, *self.taus])
        line = sparkline(list(self.taus), 1.0, top)
        table = Table.grid(padding=(0, 2))
        expected = f", {snapshot.expected:.2f} expected" if snapshot.expected else ""
        table.add_row("τ", f"{now:.2f}{expected}", line)
        shown = rates.by_position or tuple(snapshot.acceptance.rates)
        for position, share in enumerate(shown, start=1):
            table.add_row(f"at {position}", f"{share:.2f}", bar(share))
        found: list[RenderableType] = [table]
        if not shown:
            found.append(Text(_no_positions(snapshot), style="yellow"))
        found += _adaptive(snapshot, rates)
        if snapshot.warnings:
            count = int(snapshot.warnings)
            text = f"{count} warning{'s' if count > 1 else ''}: acceptance far below the record"
            found.append(Text(f"{text}; `dflash-plugin doctor --server` looks for why", "yellow"))
        return found


def _absent(snapshot: MetricsSnapshot) -> str:
    if snapshot.engine == "sglang":
        return "no speculation is counted: start SGLang with --speculative-algorithm DFLASH"
    if snapshot.passes is not None:
        return "nothing has been verified yet"
    return "no speculation is counted: start vLLM with --speculative-method dflash"


def _no_positions(snapshot: MetricsSnapshot) -> str:
    if snapshot.engine == "sglang" and snapshot.passes is None:
        return "acceptance by position comes with dflash-plugin in SGLang's environment"
    return "nothing has been verified yet"


def _adaptive(snapshot: MetricsSnapshot, rates: Rates) -> list[RenderableType]:
    """Drafts and steps under adaptive verification; nothing without it."""
    if snapshot.verified is None:
        return []
    verified, saved = rates.verified or 0.0, rates.saved or 0.0
    if verified + saved == 0:
        verified, saved = snapshot.verified, snapshot.saved or 0.0
    table = Table.grid(padding=(0, 2))
    total = verified + saved
    share = f"{saved / total:.0%} saved" if total else ""
    table.add_row("drafts", f"{verified:,.0f} verified", share)
    steps = rates.steps or snapshot.steps
    count = sum(steps.values())
    for rows, number in sorted(steps.items()):
        table.add_row(f"{rows} rows", f"{number / count:.0%}", bar(number / count))
    return [Text("adaptive verification"), table]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(value: float | None, meaning: str) -> str:
    return "–" if value is None else f"{value:.0%} {meaning}"


def scrape(
    client: ServerClient,
    interval: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[View]:
    """The view after each interval, without end; the first one comes after two scrapes.

    Args:
        client: of the server.
        interval: seconds between two scrapes.
        sleep, clock: the time's.

    Raises:
        ServerError: the server cannot be reached, or exports no metrics of an engine.
    """
    view = View(client.display_url)
    view.add(client.metrics(), clock())
    while True:
        sleep(interval)
        view.add(client.metrics(), clock())
        yield view


def watch(
    client: ServerClient,
    interval: float,
    show: Callable[[View], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> View:
    """Scrape and show until interrupted; a server that cannot be reached is tried again.

    Args:
        client: of the server.
        interval: seconds between two scrapes.
        show: called with the view after each scrape; the terminal's live display when None.
        sleep, clock: the time's.

    Returns:
        The view, which renders itself.
    """
    view = View(client.display_url)
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
                view.add(client.metrics(), clock())
            except ServerError as error:
                view.fail(str(error))
            show(view)
            sleep(interval)
    except KeyboardInterrupt:
        return
