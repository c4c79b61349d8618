"""Reads a server's Prometheus metrics, vLLM's or SGLang's, into one form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families

from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.serving import KEY

EngineName = Literal["vllm", "sglang"]
TIMEOUT = 5.0


class ServerError(DFlashError):
    """A server that does not answer, or not with what was asked for."""


@dataclass(frozen=True)
class MetricsSnapshot:
    """One scrape. Counters and gauges are None where the server does not export them.

    Attributes:
        engine: whose metrics these are; None for a server of neither.
        drafter: labels of ``dflash:drafter_info``, empty where the plugin does not run.
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
    def tau(self) -> float | None:
        """Tokens committed per verify pass so far; the engine's gauge where nothing is counted."""
        if self.passes:
            return 1 + sum(self.accepted.values()) / self.passes
        return self.length

    @property
    def rates(self) -> list[float]:
        """Share of the passes that accepted the draft at each position."""
        passes = self.passes or 0.0
        if not passes:
            return []
        return [self.accepted[position] / passes for position in sorted(self.accepted)]

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


def grown(before: float | None, after: float | None) -> float | None:
    """By how much a counter grew; one that was not there before had counted nothing."""
    return None if after is None else after - (before or 0.0)


def share_saved(verified: float | None, saved: float | None) -> float | None:
    """Drafts left unverified as a share of all; None where either is not known, or both are 0."""
    if verified is None or saved is None or verified + saved == 0:
        return None
    return saved / (verified + saved)


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

    def total(self, name: str, **labels: str) -> float | None:
        """Sum over all samples with these labels; None where there is none."""
        values = [
            value
            for found, value in self._samples.get(name, [])
            if all(found.get(key) == wanted for key, wanted in labels.items())
        ]
        return sum(values) if values else None

    def count(self, name: str) -> int | None:
        """The sum of a counter of whole things; None where there is none."""
        found = self.total(name)
        return None if found is None else round(found)

    def largest(self, name: str) -> float | None:
        """Of all samples."""
        return max((value for _, value in self._samples.get(name, [])), default=None)

    def by(self, name: str, label: str) -> dict[int, float]:
        """Sums by a label that holds integers."""
        sums: dict[int, float] = {}
        for labels, value in self._samples.get(name, []):
            key = labels.get(label, "")
            if key.isdecimal():
                sums[int(key)] = sums.get(int(key), 0.0) + value
        return dict(sorted(sums.items()))

    def labels(self, name: str) -> Mapping[str, str]:
        """Of the first sample; empty where there is none."""
        found = self._samples.get(name)
        return found[0][0] if found else {}

    def engine(self) -> EngineName | None:
        """Whose metrics these are."""
        engines: tuple[EngineName, ...] = ("vllm", "sglang")
        for engine in engines:
            if any(name.startswith(f"{engine}:") for name in self._samples):
                return engine
        return None


def read(text: str) -> MetricsSnapshot:
    """What ``/metrics`` answered, in the form of both engines.

    Raises:
        ServerError: it is not Prometheus text.
    """
    samples = Samples(text)
    engine = samples.engine()
    ours: dict[str, Any] = {
        "drafter": samples.labels("dflash:drafter_info"),
        "expected": samples.largest("dflash:expected_acceptance_length"),
        "warnings": samples.total("dflash:acceptance_warnings_total"),
        "proposed": samples.total("dflash:proposed_drafts_total"),
        "verified": samples.total("dflash:verified_drafts_total"),
        "saved": samples.total("dflash:saved_drafts_total"),
        "steps": samples.by("dflash:adaptive_steps_total", "rows"),
    }
    theirs = {"vllm": _vllm, "sglang": _sglang}
    return MetricsSnapshot(engine=engine, **ours, **(theirs[engine](samples) if engine else {}))


def _vllm(samples: Samples) -> dict[str, Any]:
    return {
        "running": samples.total("vllm:num_requests_running"),
        "waiting": samples.total("vllm:num_requests_waiting"),
        "kv_usage": samples.largest("vllm:kv_cache_usage_perc"),
        "generated": samples.total("vllm:generation_tokens_total"),
        "prompt_tokens": samples.total("vllm:prefix_cache_queries_total"),
        "cached_tokens": samples.total("vllm:prefix_cache_hits_total"),
        "passes": samples.total("vllm:spec_decode_num_drafts_total"),
        "accepted": samples.by("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position"),
    }


def _sglang(samples: Samples) -> dict[str, Any]:
    # Releases that count tokens as they come have a counter of their own for it.
    realtime = samples.total("sglang:realtime_tokens_total", mode="decode")
    generated = samples.total("sglang:generation_tokens_total")
    return {
        "running": samples.total("sglang:num_running_reqs"),
        "waiting": samples.total("sglang:num_queue_reqs"),
        "kv_usage": samples.largest("sglang:token_usage"),
        "generated": generated if realtime is None else realtime,
        "tokens_per_second": samples.total("sglang:gen_throughput"),
        "prompt_tokens": samples.total("sglang:prompt_tokens_total"),
        "cached_tokens": samples.total("sglang:cached_tokens_total"),
        "passes": samples.total("dflash:verify_passes_total"),
        "accepted": samples.by("dflash:accepted_drafts_total", "position"),
        "length": samples.largest("sglang:spec_accept_length"),
    }


def plugin_states(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plugin's part of SGLang's ``/server_info``, of each data-parallel rank; [] without it."""
    states = info.get("internal_states") or []
    return [state[KEY] for state in states if isinstance(state, dict) and KEY in state]


class ServerClient:
    """Asks a server for its metrics.

    Args:
        url: of the server, such as http://localhost:8000.
        transport: of httpx; for tests.
    """

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(timeout=TIMEOUT, transport=transport)

    def reading(self) -> MetricsSnapshot:
        """Scrape ``/metrics``.

        Raises:
            ServerError: the server does not answer, or exports no metrics of an engine.
        """
        answer = self._get("/metrics")
        found = read(answer.text) if answer.status_code == 200 else MetricsSnapshot()
        if found.engine is None:
            status = "" if answer.status_code == 200 else f" (status {answer.status_code})"
            raise ServerError(
                f"{self.url}/metrics has no metrics of vLLM or SGLang{status}: give the root URL "
                "of one, and start SGLang with --enable-metrics, vLLM without --disable-log-stats"
            )
        return found

    def info(self) -> dict[str, Any] | None:
        """SGLang's ``/server_info``; None where there is no such page."""
        answer = self._get("/server_info")
        if answer.status_code != 200:
            return None
        try:
            found = answer.json()
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _get(self, path: str) -> httpx.Response:
        try:
            return self._client.get(self.url + path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(
                f"{self.url} does not answer ({reason(error)}): start the server, or give its URL "
                "like http://localhost:8000"
            ) from error
