"""Checks of a running server, by its metrics and by what SGLang says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_plugin.doctor.probe import Probe, Question, Round, ServerProber
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.monitor.client import EngineName, MetricsSnapshot, ServerClient, ServerError
from dflash_plugin.monitor.metrics import completed, summary
from dflash_plugin.serving.acceptance import probable_cause

# Verify passes by which acceptance can be judged.
MIN_PASSES = 50
# Share of τ - 1 here that a server should reach, and that its other requests should.
LOW, LOW_ELSEWHERE = 0.7, 0.5
# Share of prompt tokens from the prefix cache, and of drafts left unverified, that can explain it.
MANY_HITS, MANY_SAVED = 0.3, 0.1
# Share of an answer's tokens that a server of the same target agrees on, whatever its dtype.
SAME = 0.05
INSTALL = "install dflash-plugin in the server's environment, without DFLASH_PLUGIN=off"


@dataclass(frozen=True)
class Served:
    """What a server tells.

    Attributes:
        url: of the server.
        reading: its metrics, completed by what ``/server_info`` counts.
        info: SGLang's ``/server_info``.
        missing: why there are no metrics, or None.
        asking: puts prompts to it; None to look only.
    """

    url: str
    reading: MetricsSnapshot
    info: Mapping[str, Any]
    missing: str | None = None
    asking: ServerProber | None = None

    @property
    def engine(self) -> EngineName:
        """What serves."""
        return self.reading.engine or "sglang"

    @property
    def plugin(self) -> bool:
        """Whether this plugin drafts there, and not the engine's own DFlash."""
        return bool(self.reading.drafter) or bool(summary(self.info))

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

    def probe(self, questions: Sequence[Question], here: Callable[[], float]) -> Probe | None:
        """Ask it what Transformers was asked; None where that tells nothing.

        Args:
            questions: token ids.
            here: gives τ of the same texts in Transformers.
        """
        if self.asking is None or not self.speculates:
            return None
        return self.asking.probe(self.engine, questions, here())


def ask(client: ServerClient, asking: ServerProber | None = None) -> Served:
    """Read a server's metrics and information.

    Args:
        client: of the server.
        asking: of the same, to put prompts to it later.

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
        reading = MetricsSnapshot(engine="sglang")
    return Served(client.url, completed(reading, info), info, missing, asking)


def check_server(
    served: Served, tau: float, expected: float | None, probe: Probe | None = None
) -> list[Check]:
    """Hold what a server accepts against what the drafter reaches here.

    Args:
        served: the server.
        tau: of this pair in Transformers.
        expected: τ of the training record.
        probe: the same texts on the server, if it was asked.
    """
    checks = [_engine(served)]
    if not served.speculates:
        return checks
    fresh = probe.fresh if probe else None
    if probe is not None and fresh is not None and fresh.tau is not None:
        slow = fresh.tau - 1 < LOW * (probe.here - 1)
        cut = slow and (fresh.saved or 0.0) >= MANY_SAVED
        checks += [_adaptive(served, cut)[0], _asked(served, probe, fresh, slow and not cut)]
        checks.append(_repeated(served, fresh, probe.again, fresh.tau))
        return [*checks, _traffic(served, fresh.tau, expected)]
    reading = served.reading
    reached, passes = reading.tau, reading.passes
    low = (
        reached is not None
        and (passes is None or passes >= MIN_PASSES)
        and reached - 1 < LOW * (tau - 1)
    )
    adaptive, cut = _adaptive(served, low)
    checks += [adaptive, *([_refused(probe)] if probe else []), _prefix_cache(served, low)]
    return [*checks, _acceptance(served, tau, expected, low and not cut)]


def _engine(served: Served) -> Check:
    reading, info = served.reading, served.info
    engine = served.engine
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
                "fix": INSTALL,
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


def _asked(served: Served, probe: Probe, fresh: Round, low: bool) -> Check:
    """The same texts on the server and here."""
    tau = fresh.tau or 0.0
    check = Check(
        name="asked acceptance",
        status="ok",
        looked_at="τ of these prompts on the server, against the same texts in Transformers",
        finding=f"τ {tau:.2f} on the server, {probe.here:.2f} here",
        evidence={
            "tau_served": round(tau, 3),
            "tau_here": round(probe.here, 3),
            "passes": fresh.passes,
            "passes_counted": fresh.counted,
            "same_text": round(fresh.same, 3),
        },
    )
    if fresh.same < SAME:
        return check.model_copy(
            update={
                "status": "fault" if low else "note",
                "finding": f"{check.finding}: its target answers otherwise from the first tokens "
                "on, so it is another one, or another revision",
                "fix": "give doctor the target that the server runs, or serve this one",
                "certainty": Certainty.LIKELY,
            }
        )
    if not low:
        return check
    if not served.plugin:
        return _native(check, f"τ {tau:.2f} on these prompts", probe.here)
    return check.model_copy(
        update={
            "status": "fault",
            "finding": f"the same prompts reach τ {tau:.2f} on the server and {probe.here:.2f} "
            "here, so that it runs the drafter otherwise than this check does",
            "fix": "serve the drafter that is given here; run doctor with the server's --dtype, "
            "--draft-weights and --dialect",
            "certainty": Certainty.LIKELY,
        }
    )


def _native(check: Check, reached: str, here: float) -> Check:
    """The fault of an engine's own speculation that accepts less than the drafter does here."""
    return check.model_copy(
        update={
            "status": "fault",
            "finding": f"the engine's own speculation reaches {reached}, this drafter {here:.2f} "
            "here",
            "fix": INSTALL,
            "certainty": Certainty.LIKELY,
        }
    )


def _repeated(served: Served, fresh: Round, again: Round | None, tau: float) -> Check:
    """The same prompts once more, out of the prefix cache."""
    check = Check(
        name="prefix cache",
        status="ok",
        looked_at="τ of these prompts when their first tokens come from the prefix cache, against "
        "the first time",
        finding="asking again hit nothing: these prompts are shorter than a cached block, or the "
        "cache is off",
    )
    if again is None or again.tau is None or not again.hit_rate:
        return check
    check.evidence = {
        "hit_rate": round(again.hit_rate, 3),
        "tau_first": round(tau, 3),
        "tau_again": round(again.tau, 3),
    }
    check.finding = (
        f"τ {again.tau:.2f} with {again.hit_rate:.0%} of the prompt tokens cached, {tau:.2f} "
        "without"
    )
    if again.tau - 1 >= LOW * (tau - 1):
        return check
    if (again.saved or 0.0) >= MANY_SAVED:
        check.finding += f"; {again.saved:.0%} of the drafts were left unverified"
        return check
    return check.model_copy(
        update={
            "status": "fault",
            "finding": f"{check.finding}: the drafter lacks the features of cached tokens",
            "fix": "serve with --no-enable-prefix-caching (SGLang: --disable-radix-cache)"
            + ("" if served.plugin else ", or install dflash-plugin, which keeps the features"),
            "certainty": Certainty.MEASURED,
            "gain": tau - again.tau,
        }
    )


def _refused(probe: Probe) -> Check:
    why = probe.refused or "it verified nothing"
    return Check(
        name="asked acceptance",
        status="unchecked",
        looked_at="τ of these prompts on the server, against the same texts in Transformers",
        finding=f"the server did not answer the prompts: {why}",
        fix="see the server's log, or look only, with --no-ask",
    )


def _prefix_cache(served: Served, low: bool) -> Check:
    """Hits of a server that was not asked, whose other requests may be drafted worse anyhow."""
    rate = served.reading.hit_rate
    check = Check(
        name="prefix cache",
        status="ok",
        looked_at="prompt tokens that came from the prefix cache",
        finding="no hits are counted" if rate is None else f"{rate:.0%} of them",
        evidence={} if rate is None else {"hit_rate": round(rate, 3)},
    )
    if rate is None or rate < MANY_HITS or not low:
        return check
    return check.model_copy(
        update={
            "status": "note",
            "finding": f"{rate:.0%} of the prompt tokens come from the prefix cache: the drafter "
            "may lack their features",
            "fix": "leave --no-ask out, by which the server is asked with and without hits",
        }
    )


def _traffic(served: Served, tau: float, expected: float | None) -> Check:
    """τ of all requests so far, against that of these prompts on the same server."""
    reading = served.reading
    reached, passes = reading.tau, reading.passes
    check = Check(
        name="served acceptance",
        status="ok",
        looked_at="τ of all requests that the server had before, against these prompts there and "
        "the training record",
        finding="the server had verified nothing before",
        evidence=_evidence(reading, expected) | {"tau_asked": round(tau, 3)},
    )
    if reached is None:
        return check
    check.finding = f"τ {reached:.2f} of all requests before, {tau:.2f} of these prompts"
    if passes is not None and passes < MIN_PASSES:
        check.finding += f"; {passes:.0f} verify passes are too few to judge by"
        return check
    if reached - 1 >= LOW * (tau - 1) or (reading.saved_share or 0.0) >= MANY_SAVED:
        return check
    bar = min(tau, expected or tau)
    return check.model_copy(
        update={
            "status": "fault" if reached - 1 < LOW_ELSEWHERE * (bar - 1) else "note",
            "finding": f"{check.finding}, so that it is the requests that are drafted worse: "
            "they are probably unlike the training text (chat template, thinking mode, language, "
            "high temperature)",
            "fix": "run doctor with --data, and --raw or --thinking, on prompts as the server gets "
            "them; train the drafter on such text where that gives no other fault",
            "certainty": Certainty.LIKELY,
        }
    )


def _evidence(reading: MetricsSnapshot, expected: float | None) -> dict[str, Any]:
    return {
        "tau_served": None if reading.tau is None else round(reading.tau, 3),
        "tau_of_training": expected,
        "passes": reading.passes,
        "by_position": [round(rate, 3) for rate in reading.rates],
        "warnings": reading.warnings,
    }


def _acceptance(served: Served, tau: float, expected: float | None, low: bool) -> Check:
    reading = served.reading
    reached = reading.tau
    check = Check(
        name="served acceptance",
        status="ok",
        looked_at="τ of the server, against τ in Transformers and the training record",
        finding=f"τ {reached or 0:.2f} on the server, {tau:.2f} here",
        evidence=_evidence(reading, expected) | {"tau_here": round(tau, 3)},
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
    if not low:
        return check
    if not served.plugin:
        return _native(check, f"τ {reached:.2f}", tau)
    cause = (
        probable_cause(reading.rates) if reading.rates else "no acceptance by position is counted"
    )
    return check.model_copy(
        update={
            "status": "fault",
            "finding": f"τ is {reached:.2f} on the server and {tau:.2f} here: {cause}",
            "fix": "run doctor with --data on prompts as the server gets them, and with the "
            "server's dtype and quantization",
        }
    )
