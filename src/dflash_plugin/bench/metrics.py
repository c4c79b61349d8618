"""The numbers of a cell, from observed requests and a server's counters.

τ is the number of tokens committed per verify pass (``decoding.acceptance``). The first token of an
answer comes from the prompt's own pass and does not count; drafts that a stop or the limit cuts off
do not count either. With committed tokens cᵢ and passes pᵢ of request i:

- mean per request: mean of cᵢ / pᵢ,
- pooled: Σ cᵢ / Σ pᵢ,
- token-weighted: Σ cᵢ (cᵢ / pᵢ) / Σ cᵢ.

Requests without a verify pass are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from dflash_plugin.bench.measurements import Counters, RequestTrace
from dflash_plugin.bench.schema import (
    Cell,
    CountCheck,
    Percentiles,
    PositionRates,
    Repeat,
    Role,
    Tau,
)
from dflash_plugin.decoding.acceptance import Acceptance, tau

INTERRUPTED = Counters(
    None,
    None,
    None,
    dict.fromkeys(
        ("tokens", "passes", "accepted"),
        "the run was interrupted: the server's counters hold requests that were not finished",
    ),
)
AVERAGES = ("mean_per_request", "pooled", "token_weighted")


def mean_per_request(committed: Sequence[int], passes: Sequence[int]) -> float | None:
    """Mean of each request's tokens per pass."""
    taus = [t for c, p in zip(committed, passes, strict=True) if (t := tau(c, p)) is not None]
    return sum(taus) / len(taus) if taus else None


def pooled(committed: Sequence[int], passes: Sequence[int]) -> float | None:
    """Tokens of all requests per pass of all requests."""
    kept = [(c, p) for c, p in zip(committed, passes, strict=True) if p]
    return tau(sum(c for c, _ in kept), sum(p for _, p in kept))


def token_weighted(committed: Sequence[int], passes: Sequence[int]) -> float | None:
    """Mean of each request's tokens per pass, weighted by its tokens."""
    kept = [(c, p) for c, p in zip(committed, passes, strict=True) if p]
    weight = sum(c for c, _ in kept)
    return sum(c * c / p for c, p in kept) / weight if weight else None


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """50th, 90th and 99th, in milliseconds, interpolated; None without a value."""
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 90, 99]).tolist()
    return Percentiles(p50=round(p50, 3), p90=round(p90, 3), p99=round(p99, 3))


def read_passes_off_chunks(observations: Sequence[RequestTrace], increase: Counters) -> str | None:
    """Take streamed chunks for verify passes, if there are exactly as many.

    Args:
        observations: of one run; their ``passes`` are set.
        increase: of the server's counters over the run.

    Returns:
        Why it cannot be done, or None.
    """
    if increase.passes is None:
        return increase.sources["passes"]
    if not all(o.chunks and sum(o.chunks) == o.tokens for o in observations):
        return "the streamed chunks do not tell their tokens"
    chunks = sum(len(o.chunks) - 1 for o in observations)
    if chunks != increase.passes:
        return (
            f"{chunks} chunks were streamed for {increase.passes} verify passes, so a chunk is "
            "not a pass"
        )
    for observation in observations:
        observation.passes = len(observation.chunks) - 1
    return None


def check_counts(observations: Sequence[RequestTrace], increase: Counters) -> list[CountCheck]:
    """Compare what the answers say with the server's counters."""
    passes = [o.passes for o in observations if o.passes is not None]
    counted = {
        "tokens": sum(o.tokens for o in observations),
        "passes": sum(passes) if len(passes) == len(observations) else None,
    }
    return [
        _check("tokens", counted["tokens"], increase.tokens, increase.sources["tokens"]),
        _check("passes", counted["passes"], increase.passes, increase.sources["passes"]),
    ]


def _check(what: str, client: int | None, server: int | None, source: str) -> CountCheck:
    agrees = None if client is None or server is None else client == server
    note = source if client is not None else f"{source}; the answers do not tell theirs"
    return CountCheck.model_validate(
        {"what": what, "client": client, "server": server, "agrees": agrees, "note": note}
    )


def tau_of(
    observations: Sequence[RequestTrace], increase: Counters, by_request: str, missing: str | None
) -> Tau:
    """The three averages.

    Args:
        observations: of all runs of a cell.
        increase: of the server's counters over these runs.
        by_request: where the requests' passes come from.
        missing: why they are not known, or None.
    """
    committed = [o.committed for o in observations]
    if missing is None:
        passes = [o.passes or 0 for o in observations]
        values = {
            "mean_per_request": mean_per_request(committed, passes),
            "pooled": pooled(committed, passes),
            "token_weighted": token_weighted(committed, passes),
        }
        none = "no request had a verify pass"
        sources = {name: none if values[name] is None else by_request for name in AVERAGES}
        return Tau(sources=sources, **values)
    sources = dict.fromkeys(AVERAGES, missing)
    if not increase.passes:
        return Tau(sources=sources)
    total, undrafted = sum(committed), _undrafted(observations, increase)
    sources["pooled"] = f"tokens of the answers over passes by {increase.sources['passes']}"
    if undrafted:
        sources["pooled"] += f" and {undrafted} passes without drafts"
    return Tau(pooled=total / (increase.passes + undrafted), sources=sources)


def _undrafted(observations: Sequence[RequestTrace], increase: Counters) -> int:
    """Passes without drafts: each commits one token, and vLLM does not count it."""
    if increase.accepted is None or not increase.passes:
        return 0
    counted = increase.passes + sum(increase.accepted)
    return max(0, sum(o.committed for o in observations) - counted)


def acceptance_of(
    observations: Sequence[RequestTrace], increase: Counters, by_request: str
) -> PositionRates:
    """Accepted drafts by position, from the requests' own counts or else from the server's."""
    histograms = [o.accepted for o in observations if o.accepted is not None]
    if histograms and len(histograms) == len(observations):
        length = max(map(len, histograms))
        total = [sum(h[n] for h in histograms if n < len(h)) for n in range(length)]
        counted, source = Acceptance.of_histogram(total), by_request
    elif increase.accepted is not None and increase.passes:
        counted, source = (
            Acceptance(increase.passes, increase.accepted),
            increase.sources["accepted"],
        )
        if undrafted := _undrafted(observations, increase):
            source += f"; {undrafted} passes without drafts are left out"
    else:
        return PositionRates(source=increase.sources["accepted"])
    if not counted.rates:
        return PositionRates(source="no request had a verify pass")
    return PositionRates(
        unconditional=counted.rates, conditional=counted.conditional_rates, source=source
    )


@dataclass
class Runs:
    """The timed runs of one cell.

    Attributes:
        repeats: of the runs; one that was interrupted is the last.
        requests: of all runs, for latencies.
        counted: requests whose verify passes count: those of whole runs, and of an interrupted one
            where the answers tell their own passes.
        increases: of the server's counters over each whole run.
        whole: runs that were not interrupted.
        missing: why the requests' passes are not known, or None.
    """

    repeats: list[Repeat] = field(default_factory=list)
    requests: list[RequestTrace] = field(default_factory=list)
    counted: list[RequestTrace] = field(default_factory=list)
    increases: list[Counters] = field(default_factory=list)
    whole: int = 0
    missing: str | None = None


def make_cell(role: Role, set_name: str, concurrency: int, runs: Runs, by_request: str) -> Cell:
    """Put a cell together.

    Args:
        role, set_name, concurrency: which.
        runs: at least one.
        by_request: where the requests' passes come from.
    """
    total = add(runs.increases) if runs.increases else INTERRUPTED
    tpot = [s for o in runs.requests if (s := o.seconds_per_token) is not None]
    spread = percentiles(tpot)
    missing = runs.missing
    if not runs.counted and missing is None:
        missing = total.sources["passes"]
    # An interrupted run ends with requests under way, whose tokens are missing from its speed.
    timed = runs.repeats[: runs.whole] or runs.repeats
    return Cell(
        role=role,
        set_name=set_name,
        concurrency=concurrency,
        repeats=runs.repeats,
        tokens_per_second=round(median(r.tokens_per_second for r in timed), 2),
        per_user=round(1000 / spread.p50, 2) if spread and spread.p50 else None,
        ttft_ms=percentiles([o.first for o in runs.requests if o.tokens]),
        tpot_ms=spread,
        passes=total.passes if missing else sum(o.passes or 0 for o in runs.counted),
        tau=tau_of(runs.counted, total, by_request, missing),
        acceptance=acceptance_of(runs.counted, total, by_request),
    )


def add(counters: Sequence[Counters]) -> Counters:
    """The sum; a part of it is None where it is None in one of them."""

    def total(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    accepted = [c.accepted for c in counters if c.accepted is not None]
    return Counters(
        total([c.tokens for c in counters]),
        total([c.passes for c in counters]),
        tuple(map(sum, zip(*accepted, strict=True))) if len(accepted) == len(counters) else None,
        counters[-1].sources,
    )
