"""Checks of a running server, by its metrics and by what SGLang says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.serving.acceptance import likely
from dflash_plugin.serving.hosted import KEY
from dflash_plugin.serving.scrape import Reading, ServerClient, ServerError

# Verify passes by which acceptance can be judged.
MIN_PASSES = 50
# Share of τ - 1 here that a server should reach.
LOW = 0.7
# Share of prompt tokens from the prefix cache, and of drafts left unverified, that can explain it.
MANY_HITS, MANY_SAVED = 0.3, 0.1


@dataclass(frozen=True)
class Served:
    """What a server tells.

    Attributes:
        url: of the server.
        reading: its metrics, completed by what ``/server_info`` counts.
        info: SGLang's ``/server_info``.
        missing: why there are no metrics, or None.
    """

    url: str
    reading: Reading
    info: Mapping[str, Any]
    missing: str | None = None

    @property
    def plugin(self) -> bool:
        """Whether this plugin drafts there, and not the engine's own DFlash."""
        return bool(self.reading.drafter) or bool(_summary(self.info))

    @property
    def speculates(self) -> bool:
        """Whether drafts are verified at all."""
        algorithm = self.info.get("speculative_algorithm")
        return self.plugin or bool(algorithm) or self.reading.passes is not None

    @property
    def drafts(self) -> int | None:
        """Speculative tokens of a request."""
        block = self.info.get("speculative_num_draft_tokens")
        return int(block) - 1 if block else len(self.reading.accepted) or None


def ask(client: ServerClient) -> Served:
    """Read a server's metrics and information.

    Raises:
        ServerError: it does not answer, or tells nothing.
    """
    info = client.info() or {}
    missing = None
    try:
        reading = client.reading()
    except ServerError as error:
        if not info:
            raise
        missing = str(error)
        reading = Reading(engine="sglang")
    return Served(client.url, _completed(reading, info), info, missing)


def _summary(info: Mapping[str, Any]) -> dict[str, Any]:
    states = info.get("internal_states") or [{}]
    found = states[0].get(KEY) if isinstance(states[0], dict) else None
    return found or {}


def _completed(reading: Reading, info: Mapping[str, Any]) -> Reading:
    """With SGLang's own counts, which need no metrics and are not a step behind."""
    states = info.get("internal_states") or [{}]
    native = states[0].get("avg_spec_accept_length")
    summary = _summary(info)
    if not summary:
        return replace(reading, length=native) if native and not reading.length else reading
    passes = summary.get("verify_passes", 0)
    rates = summary.get("accept_by_position", [])
    adaptive = summary.get("adaptive", {})
    return replace(
        reading,
        passes=passes,
        accepted={position: rate * passes for position, rate in enumerate(rates)},
        expected=summary.get("expected_acceptance_length"),
        verified=adaptive.get("drafts_verified", reading.verified),
        saved=adaptive.get("drafts_saved", reading.saved),
    )


def check_server(served: Served, tau: float, expected: float | None) -> list[Check]:
    """Hold what a server accepts against what the drafter reaches here.

    Args:
        served: the server.
        tau: of this pair in Transformers.
        expected: τ of the training record.
    """
    checks = [_engine(served)]
    if not served.speculates:
        return checks
    reading = served.reading
    reached, passes = reading.tau, reading.passes
    low = (
        reached is not None
        and (passes is None or passes >= MIN_PASSES)
        and reached - 1 < LOW * (tau - 1)
    )
    adaptive, cut = _adaptive(served, low)
    cache, cached = _prefix_cache(served, low and not cut)
    return [*checks, adaptive, cache, _acceptance(served, tau, expected, low, cut or cached)]


def _engine(served: Served) -> Check:
    reading, info = served.reading, served.info
    engine = reading.engine or "sglang"
    evidence: dict[str, Any] = {"engine": engine, "plugin": dict(reading.drafter)}
    evidence |= {
        key: info[key]
        for key in ("version", "dtype", "quantization", "kv_cache_dtype", "attention_backend")
        if info.get(key) is not None
    }
    check = Check(
        name="server",
        status="ok",
        looked_at=f"/metrics and /server_info of {served.url}",
        finding=f"{engine} drafts with this plugin",
        evidence=evidence,
    )
    if not served.speculates:
        flags = {
            "vllm": "--speculative-method dflash --speculative-model DRAFTER",
            "sglang": "--speculative-algorithm DFLASH --speculative-draft-model-path DRAFTER",
        }
        return check.model_copy(
            update={
                "status": "fault",
                "finding": f"{engine} runs without a drafter",
                "fix": f"start it with {flags[engine]}",
                "certainty": Certainty.SURE,
            }
        )
    if not served.plugin:
        return check.model_copy(
            update={
                "status": "note",
                "finding": f"{engine}'s own speculation runs, not this plugin's",
                "fix": "install dflash-plugin in the server's environment, without DFLASH_PLUGIN="
                "off",
            }
        )
    if served.missing is not None:
        check.finding += f"; {served.missing}"
    return check


def _adaptive(served: Served, low: bool) -> tuple[Check, bool]:
    """The check, and whether cut blocks explain a low τ."""
    share = served.reading.saved_share
    check = Check(
        name="adaptive verification",
        status="ok",
        looked_at="drafts that were verified and that were left unverified",
        finding="every draft is verified",
    )
    if share is None:
        return check, False
    check.evidence = {
        "verified": served.reading.verified,
        "saved": served.reading.saved,
        "share_saved": round(share, 3),
        "steps_by_rows": dict(served.reading.steps),
    }
    check.finding = f"{share:.0%} of the drafts are left unverified"
    if share < MANY_SAVED:
        return check, False
    check.status = "note" if low else "ok"
    check.finding += ": τ is lower by that, not by the drafter"
    check.fix = (
        "to see the drafter's own τ, serve once with DFLASH_PLUGIN_ADAPTIVE_VERIFICATION=0 "
        '(vLLM: "enable_adaptive_verification": false)'
    )
    return check, low


def _prefix_cache(served: Served, low: bool) -> tuple[Check, bool]:
    """The check, and whether prefix hits are likely to explain a low τ."""
    rate = served.reading.hit_rate
    check = Check(
        name="prefix cache",
        status="ok",
        looked_at="prompt tokens that came from the prefix cache",
        finding="no hits are counted" if rate is None else f"{rate:.0%} of them",
        evidence={} if rate is None else {"hit_rate": round(rate, 3)},
    )
    if rate is None or rate < MANY_HITS or not low:
        return check, False
    return check.model_copy(
        update={
            "status": "fault",
            "finding": f"{rate:.0%} of the prompt tokens come from the prefix cache and τ is low: "
            "the drafter may lack the features of cached tokens",
            "fix": "serve with --no-enable-prefix-caching (SGLang: --disable-radix-cache) and "
            "compare τ"
            + ("" if served.plugin else ", or install dflash-plugin, which keeps the features"),
            "certainty": Certainty.LIKELY,
        }
    ), True


def _acceptance(
    served: Served, tau: float, expected: float | None, low: bool, explained: bool
) -> Check:
    reading = served.reading
    reached = reading.tau
    evidence = {
        "tau_served": None if reached is None else round(reached, 3),
        "tau_here": round(tau, 3),
        "tau_of_training": expected,
        "passes": reading.passes,
        "by_position": [round(rate, 3) for rate in reading.rates],
        "warnings": reading.warnings,
    }
    check = Check(
        name="served acceptance",
        status="ok",
        looked_at="τ of the server, against τ in Transformers and the training record",
        finding=f"τ {reached or 0:.2f} on the server, {tau:.2f} here",
        evidence=evidence,
    )
    if reached is None or (reading.passes is not None and reading.passes < MIN_PASSES):
        count = int(reading.passes or 0)
        return check.model_copy(
            update={
                "status": "unchecked",
                "finding": f"{count} verify passes are too few to judge by",
                "fix": f"send requests until it has verified {MIN_PASSES} blocks",
            }
        )
    if not low or explained:
        return check
    if not served.plugin:
        return check.model_copy(
            update={
                "status": "fault",
                "finding": f"the engine's own speculation reaches τ {reached:.2f}, this drafter "
                f"{tau:.2f} here",
                "fix": "install dflash-plugin in the server's environment",
                "certainty": Certainty.LIKELY,
            }
        )
    cause = likely(reading.rates) if reading.rates else "no acceptance by position is counted"
    return check.model_copy(
        update={
            "status": "fault",
            "finding": f"τ is {reached:.2f} on the server and {tau:.2f} here: {cause}",
            "fix": "run doctor with --data on prompts as the server gets them, and with the "
            "server's dtype and quantisation",
        }
    )
