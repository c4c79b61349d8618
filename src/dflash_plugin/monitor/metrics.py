"""Metrics of a vLLM or SGLang server in one form: ``MetricsSnapshot``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from dflash_plugin.decoding.acceptance import Acceptance
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.serving import KEY
from dflash_plugin.serving.prometheus import WORKER_FACTS

EngineName = Literal["vllm", "sglang"]


class ServerError(DFlashError):
    """A server cannot be reached, refuses a request, or answers with something else."""


class MetricNames(NamedTuple):
    """An engine's Prometheus names; None where the engine has no such metric.

    Attributes:
        running, waiting: gauges, requests.
        kv_usage: gauge, share of the KV cache in use.
        generated: counter, output tokens.
        prompt_tokens, cached_tokens: counters.
        passes: counter, verify passes.
        accepted: counter, verify passes that accepted the draft at the label ``position``.
        tokens_per_second, acceptance_length: gauges of the engine's own.
    """

    running: str
    waiting: str
    kv_usage: str
    generated: str
    prompt_tokens: str
    cached_tokens: str
    passes: str
    accepted: str
    tokens_per_second: str | None = None
    acceptance_length: str | None = None


NAMES: dict[EngineName, MetricNames] = {
    "vllm": MetricNames(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_usage="vllm:kv_cache_usage_perc",
        generated="vllm:generation_tokens_total",
        prompt_tokens="vllm:prefix_cache_queries_total",
        cached_tokens="vllm:prefix_cache_hits_total",
        passes="vllm:spec_decode_num_drafts_total",
        accepted="vllm:spec_decode_num_accepted_tokens_per_pos_total",
    ),
    "sglang": MetricNames(
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        kv_usage="sglang:token_usage",
        generated="sglang:generation_tokens_total",
        prompt_tokens="sglang:prompt_tokens_total",
        cached_tokens="sglang:cached_tokens_total",
        # SGLang has no counters by position of its own; the plugin adds them.
        passes="dflash:verify_passes_total",
        accepted="dflash:accepted_drafts_total",
        tokens_per_second="sglang:gen_throughput",
        acceptance_length="sglang:spec_accept_length",
    ),
}
# SGLang's own counter of verify passes.
SGLANG_VERIFY_CALLS = "sglang:spec_verify_calls_total"
# SGLang releases that count tokens as they are written have this counter, with ``mode="decode"``.
SGLANG_REALTIME_TOKENS = "sglang:realtime_tokens_total"
DRAFTER_INFO = "dflash:drafter_info"
# How the plugin's drafter runs; and vLLM's own labels of its cache.
ENGINE_INFO, WORKER_INFO = "dflash:engine_info", "dflash:worker_info"
CACHE_INFO = "vllm:cache_config_info"


@dataclass(frozen=True)
class MetricsSnapshot:
    """One scrape. Counters and gauges are None where the server does not export them.

    Attributes:
        engine: whose metrics these are; None for a server of neither.
        drafter: labels of ``dflash:drafter_info``, empty where the plugin does not run.
        setup: labels of ``dflash:engine_info`` and ``dflash:worker_info``.
        cache: labels of ``vllm:cache_config_info``.
        cache_groups, cache_tokens_lost: groups of vLLM's KV cache, and what the drafter takes.
        running, waiting: requests.
        kv_usage: share of the KV cache that is in use, of the fullest engine.
        generated: output tokens so far.
        tokens_per_second: the engine's own figure.
        prompt_tokens, cached_tokens: so far; cached ones came from the prefix cache.
        passes: verify passes of requests so far.
        accepted: by position from 0, passes that accepted the draft there.
        length: τ by the engine's own gauge.
        expected: τ of the drafter's record.
        warnings: windows with acceptance far too low.
        proposed, verified, saved: drafts so far, under adaptive verification.
        steps: by rows of a request, steps under adaptive verification.
    """

    engine: EngineName | None = None
    drafter: Mapping[str, str] = field(default_factory=dict)
    setup: Mapping[str, str] = field(default_factory=dict)
    cache: Mapping[str, str] = field(default_factory=dict)
    cache_groups: float | None = None
    cache_tokens_lost: float | None = None
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    generated: float | None = None
    tokens_per_second: float | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None
    passes: float | None = None
    accepted: Mapping[int, float] = field(default_factory=dict)
    length: float | None = None
    expected: float | None = None
    warnings: float | None = None
    proposed: float | None = None
    verified: float | None = None
    saved: float | None = None
    steps: Mapping[int, float] = field(default_factory=dict)

    @property
    def acceptance(self) -> Acceptance:
        """Verify passes so far, and how many of them accepted the draft at each position."""
        counts = tuple(self.accepted[position] for position in sorted(self.accepted))
        return Acceptance(self.passes or 0.0, counts)

    @property
    def tau(self) -> float | None:
        """Tokens committed per verify pass so far; the engine's gauge where nothing is counted."""
        return self.acceptance.tau if self.passes else self.length

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompts' tokens that came from the prefix cache."""
        if not self.prompt_tokens or self.cached_tokens is None:
            return None
        return self.cached_tokens / self.prompt_tokens

    @property
    def saved_share(self) -> float | None:
        """Share of the drafts that adaptive verification left unverified; None without it."""
        return share_saved(self.verified, self.saved)


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

    @property
    def saved_share(self) -> float | None:
        """Share of the drafts that adaptive verification left unverified; None without it."""
        return share_saved(self.verified, self.saved)


def increase(before: float | None, after: float | None) -> float | None:
    """Increase of a counter. A counter that was missing before had counted nothing."""
    return None if after is None else after - (before or 0.0)


def share_saved(verified: float | None, saved: float | None) -> float | None:
    """Drafts left unverified as a share of all; None where either is not known, or both are 0."""
    if verified is None or saved is None or verified + saved == 0:
        return None
    return saved / (verified + saved)


def rates_between(before: MetricsSnapshot, after: MetricsSnapshot, seconds: float) -> Rates:
    """What happened between two scrapes that were ``seconds`` apart."""
    restarted = _restarted(before, after)
    if restarted:
        before = MetricsSnapshot(engine=after.engine)
    generated = increase(before.generated, after.generated)
    prompt = increase(before.prompt_tokens, after.prompt_tokens)
    cached = increase(before.cached_tokens, after.cached_tokens)
    # What a server has generated since it started again took another time than ``seconds``.
    counted = generated is not None and seconds > 0 and not restarted
    acceptance = Acceptance(
        increase(before.passes, after.passes) or 0.0,
        tuple(after.accepted[k] - before.accepted.get(k, 0.0) for k in sorted(after.accepted)),
    )
    return Rates(
        tokens_per_second=(generated or 0.0) / seconds if counted else after.tokens_per_second,
        tau=after.length if after.passes is None else acceptance.tau,
        by_position=tuple(acceptance.rates),
        hit_rate=(cached or 0.0) / prompt if prompt and cached is not None else None,
        verified=increase(before.verified, after.verified),
        saved=increase(before.saved, after.saved),
        steps={
            rows: count - before.steps.get(rows, 0.0)
            for rows, count in after.steps.items()
            if count > before.steps.get(rows, 0.0)
        },
        warnings=increase(before.warnings, after.warnings),
        restarted=restarted,
    )


def _restarted(before: MetricsSnapshot, after: MetricsSnapshot) -> bool:
    pairs = [
        (before.generated, after.generated),
        (before.passes, after.passes),
        (before.prompt_tokens, after.prompt_tokens),
    ]
    return any(a is not None and b is not None and b < a for a, b in pairs)


class Samples:
    """Samples of one exposition by name; those of ranks other than the first are left out.

    Args:
        text: what ``/metrics`` answered.

    Raises:
        ServerError: it is not Prometheus text.
    """

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = sample.labels
                    first = all(labels.get(rank, "0") == "0" for rank in ("tp_rank", "pp_rank"))
                    if first and math.isfinite(sample.value):
                        self._samples.setdefault(sample.name, []).append((labels, sample.value))
        except (ValueError, KeyError, IndexError) as error:
            raise ServerError(
                f"/metrics is not Prometheus text ({reason(error)}): give the URL of a vLLM or "
                "SGLang server"
            ) from error

    def total(self, name: str | None, **labels: str) -> float | None:
        """Sum over all samples with these labels; None where there is none."""
        values = [
            value
            for found, value in self._samples.get(name or "", [])
            if all(found.get(key) == wanted for key, wanted in labels.items())
        ]
        return sum(values) if values else None

    def count(self, name: str) -> int | None:
        """The sum of a counter of whole things; None where there is none."""
        found = self.total(name)
        return None if found is None else round(found)

    def largest(self, name: str | None) -> float | None:
        """The largest value of all samples; None where there is none."""
        return max((value for _, value in self._samples.get(name or "", [])), default=None)

    def by(self, name: str, label: str) -> dict[int, float]:
        """Sums by a label that holds integers."""
        sums: dict[int, float] = {}
        for labels, value in self._samples.get(name, []):
            key = labels.get(label, "")
            if key.isdecimal():
                sums[int(key)] = sums.get(int(key), 0.0) + value
        return dict(sorted(sums.items()))

    def labels(self, name: str) -> Mapping[str, str]:
        """Labels of the first sample; empty where there is none."""
        found = self._samples.get(name)
        return found[0][0] if found else {}

    def engine(self) -> EngineName | None:
        """The engine whose metrics these are."""
        for engine in NAMES:
            if any(name.startswith(f"{engine}:") for name in self._samples):
                return engine
        return None


def snapshot_of(text: str) -> MetricsSnapshot:
    """The snapshot of what ``/metrics`` answered.

    Raises:
        ServerError: it is not Prometheus text.
    """
    samples = Samples(text)
    engine = samples.engine()
    snapshot = MetricsSnapshot(
        engine=engine,
        drafter=samples.labels(DRAFTER_INFO),
        setup={**samples.labels(ENGINE_INFO), **samples.labels(WORKER_INFO)},
        cache=samples.labels(CACHE_INFO),
        cache_groups=samples.largest("dflash:kv_cache_groups"),
        cache_tokens_lost=samples.largest("dflash:kv_cache_tokens_lost"),
        expected=samples.largest("dflash:expected_acceptance_length"),
        warnings=samples.total("dflash:acceptance_warnings_total"),
        proposed=samples.total("dflash:proposed_drafts_total"),
        verified=samples.total("dflash:verified_drafts_total"),
        saved=samples.total("dflash:saved_drafts_total"),
        steps=samples.by("dflash:adaptive_steps_total", "rows"),
    )
    if engine is None:
        return snapshot
    names = NAMES[engine]
    realtime = samples.total(SGLANG_REALTIME_TOKENS, mode="decode")
    return replace(
        snapshot,
        running=samples.total(names.running),
        waiting=samples.total(names.waiting),
        kv_usage=samples.largest(names.kv_usage),
        generated=samples.total(names.generated) if realtime is None else realtime,
        tokens_per_second=samples.total(names.tokens_per_second),
        prompt_tokens=samples.total(names.prompt_tokens),
        cached_tokens=samples.total(names.cached_tokens),
        passes=samples.total(names.passes),
        accepted=samples.by(names.accepted, "position"),
        length=samples.largest(names.acceptance_length),
    )


def plugin_states(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plugin's part of SGLang's ``/server_info``, of each data-parallel rank; [] without it."""
    states = info.get("internal_states") or []
    return [state[KEY] for state in states if isinstance(state, dict) and KEY in state]


def plugin_state(info: Mapping[str, Any]) -> dict[str, Any]:
    """The plugin's part of SGLang's ``/server_info``, of the first rank; empty without it."""
    return next(iter(plugin_states(info)), {})


def with_server_info(snapshot: MetricsSnapshot, info: Mapping[str, Any]) -> MetricsSnapshot:
    """Add SGLang's own counts, which need no metrics and are not a step behind.

    Args:
        snapshot: of ``/metrics``; empty where the server exports none.
        info: ``/server_info``.
    """
    states = info.get("internal_states") or [{}]
    native = states[0].get("avg_spec_accept_length")
    state = plugin_state(info)
    if not state:
        return replace(snapshot, length=native) if native and not snapshot.length else snapshot
    passes = state.get("verify_passes", 0)
    adaptive = state.get("adaptive", {})
    return replace(
        snapshot,
        passes=passes,
        accepted={k: rate * passes for k, rate in enumerate(state.get("accept_by_position", []))},
        expected=state.get("expected_acceptance_length"),
        setup={**snapshot.setup, **{name: state[name] for name in WORKER_FACTS if name in state}},
        verified=adaptive.get("drafts_verified", snapshot.verified),
        saved=adaptive.get("drafts_saved", snapshot.saved),
    )
