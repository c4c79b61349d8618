"""The numbers of a cell, from observed requests and a server's counters.

τ is the number of tokens committed per verify pass, the bonus token included. The first token of an
answer comes from the prompt's own pass and does not count; drafts that a stop or the limit cuts off
do not count either. With committed tokens cᵢ and passes pᵢ of request i:

- mean per request: mean of cᵢ / pᵢ,
- pooled: Σ cᵢ / Σ pᵢ,
- token-weighted: Σ cᵢ (cᵢ / pᵢ) / Σ cᵢ.

Requests without a verify pass are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from dflash_plugin.bench.measurements import Counters, RequestTrace
from dflash_plugin.bench.schema import Acceptance, Cell, Check, Percentiles, Repeat, Role, Tau

AVERAGES = ("mean_per_request", "pooled", "token_weighted")


def mean_per_request(committed: Sequence[int], passes: Sequence[int]) -> float | None:
    """Mean of each request's tokens per pass."""
    taus = [c / p for c, p in zip(committed, passes, strict=True) if p]
    return sum(taus) / len(taus) if taus else None


def pooled(committed: Sequence[int], passes: Sequence[int]) -> float | None:
    """Tokens of all requests per pass of all requests."""
    kept = [(c, p) for c, p in zip(committed, passes, strict=True) if p]
    return sum(c for c, _ in kept) / sum(p for _, p in kept) if kept else None


def token_weighted(committed: Sequence[int], passes: Sequence[int]) -> float | None:
    """Mean of each request's tokens per pass, weighted by its tokens."""
    kept = [(c, p) for c, p in zip(committed, passes, strict=True) if p]
    weight = sum(c for c, _ in kept)
    return sum(c * c / p for c, p in kept) / weight if weight else None


def conditional(unconditional: Sequence[float]) -> list[float | None]:
    """Share of passes that accepted position k, among those that accepted all before it."""
    before = [1.0, *unconditional[:-1]]
    return [now / then if then else None for now, then in zip(unconditional, before, strict=True)]


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """In milliseconds, interpolated between the nearest two; None of nothing."""
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 90, 99]).tolist()
    return Percentiles(p50=round(p50, 3), p90=round(p90, 3), p99=round(p99, 3))


def read_passes_off_chunks(observations: Sequence[RequestTrace], grown: Counters) -> str | None:
    """Take streamed chunks for verify passes, if there are exactly as many.

    Args:
        observations: of one run; their ``passes`` are set.
        grown: the server's counters over the run.

    Returns:
        Why it cannot be done, or None.
    """
    if grown.passes is None:
        return grown.sources["passes"]
    if not all(o.chunks and sum(o.chunks) == o.tokens for o in observations):
        return "the streamed chunks do not tell their tokens"
    chunks = sum(len(o.chunks) - 1 for o in observations)
    if chunks != grown.passes:
        return (
            f"{chunks} chunks were streamed for {grown.passes} verify passes, so a chunk is not a "
            "pass"
        )
    for observation in observations:
        observation.passes = len(observation.chunks) - 1
    return None


def check_counts(observations: Sequence[RequestTrace], grown: Counters) -> list[Check]:
    """Compare what the answers say with the server's counters."""
    passes = [o.passes for o in observations if o.passes is not None]
    counted = {
        "tokens": sum(o.tokens for o in observations),
        "passes": sum(passes) if len(passes) == len(observations) else None,
    }
    return [
        _check("tokens", counted["tokens"], grown.tokens, grown.sources["tokens"]),
        _check("passes", counted["passes"], grown.passes, grown.sources["passes"]),
    ]


def _check(what: str, client: int | None, server: int | None, source: str) -> Check:
    agrees = None if client is None or server is None else client == server
    note = source if client is not None else f"{source}; the answers do not tell theirs"
    return Check.model_validate(
        {"what": what, "client": client, "server": server, "agrees": agrees, "note": note}
    )


def tau_of(
    observations: Sequence[RequestTrace], grown: Counters, by_request: str, missing: str | None
) -> Tau:
    """The three averages.

    Args:
        observations: of all runs of a cell.
        grown: the server's counters over these runs.
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
    if not grown.passes:
        return Tau(sources=sources)
    # A pass without drafts commits one token, and vLLM does not count it.
    total, counted = sum(committed), grown.passes + sum(grown.accepted or ())
    undrafted = max(0, total - counted) if grown.accepted is not None else 0
    sources["pooled"] = f"tokens of the answers over passes by {grown.sources['passes']}"
    if undrafted:
        sources["pooled"] += f" and {undrafted} passes without drafts"
    return Tau(pooled=total / (grown.passes + undrafted), sources=sources)


def acceptance_of(
    observations: Sequence[RequestTrace], grown: Counters, by_request: str
) -> Acceptance:
    """Accepted drafts by position, from the requests' own counts or else from the server's."""
    histograms = [o.accepted for o in observations if o.accepted is not None]
    if histograms and len(histograms) == len(observations):
        width = max(map(len, histograms))
        total = [sum(h[n] for h in histograms if n < len(h)) for n in range(width)]
        passes, source = sum(total), by_request
        accepted = [sum(total[position:]) for position in range(1, width)]
    elif grown.accepted is not None and grown.passes:
        passes, source = grown.passes, grown.sources["accepted"]
        accepted = list(grown.accepted)
    else:
        return Acceptance(source=grown.sources["accepted"])
    if not passes or not accepted:
        return Acceptance(source="no request had a verify pass")
    shares = [count / passes for count in accepted]
    return Acceptance(unconditional=shares, conditional=conditional(shares), source=source)


def make_cell(
    role: Role,
    set_name: str,
    concurrency: int,
    repeats: list[Repeat],
    observations: Sequence[RequestTrace],
    grown: Sequence[Counters],
    by_request: str,
    missing: str | None,
) -> Cell:
    """Put a cell together.

    Args:
        role, set_name, concurrency: which.
        repeats: its runs.
        observations: of all of them.
        grown: how the server's counters grew over each.
        by_request: where the requests' passes come from.
        missing: why they are not known, or None.
    """
    total = add(grown)
    tpot = [s for o in observations if (s := o.seconds_per_token) is not None]
    spread = percentiles(tpot)
    passes = total.passes if missing else sum(o.passes or 0 for o in observations)
    return Cell(
        role=role,
        set_name=set_name,
        concurrency=concurrency,
        repeats=repeats,
        tokens_per_second=round(median(r.tokens_per_second for r in repeats), 2),
        per_user=round(1000 / spread.p50, 2) if spread and spread.p50 else None,
        ttft_ms=percentiles([o.first for o in observations if o.tokens]),
        tpot_ms=spread,
        passes=passes,
        tau=tau_of(observations, total, by_request, missing),
        acceptance=acceptance_of(observations, total, by_request),
    )


def add(counters: Sequence[Counters]) -> Counters:
    """The sum; None where one of them is."""

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
