"""Checks of a running server, by its metrics and by what SGLang says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dflash_plugin.doctor.probe import Probe, ProbeRound, Question, ServerProber
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.monitor.client import ServerClient
from dflash_plugin.monitor.metrics import (
    EngineName,
    MetricsSnapshot,
    ServerError,
    plugin_state,
    with_server_info,
)
from dflash_plugin.serving.acceptance import probable_cause

# Verify passes by which acceptance can be judged.
MIN_PASSES = 50
# Share of the reference's τ - 1 that a server should reach on the same prompts, and the share that
# its other requests should reach.
LOW, LOW_TRAFFIC = 0.7, 0.5
# Share of prompt tokens from the prefix cache, and of drafts left unverified, that explain a low τ.
MANY_HITS, MANY_SAVED = 0.3, 0.1
# Share of an answer's tokens that a server of the same target agrees on, whatever its dtype.
MIN_AGREEMENT = 0.05
INSTALL = "install dflash-plugin in the server's environment, without DFLASH_PLUGIN=off"


@dataclass(frozen=True)
class InspectedServer:
    """What a server tells of itself.

    Attributes:
        url: of the server, without credentials.
        snapshot: its metrics, completed by what ``/server_info`` counts.
        info: SGLang's ``/server_info``.
        missing: why there are no metrics, or None.
        model: SGLang's ``/model_info``.
        prober: sends prompts to the server; None where no prompt may be sent.
    """

    url: str
    snapshot: MetricsSnapshot
    info: Mapping[str, Any]
    missing: str | None = None
    prober: ServerProber | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> EngineName:
        """The engine that serves."""
        return self.snapshot.engine or "sglang"

    @property
    def plugin(self) -> bool:
        """Whether this plugin drafts there, and not the engine's own DFlash."""
        return bool(self.snapshot.drafter) or bool(plugin_state(self.info))

    @property
    def speculates(self) -> bool:
        """Whether drafts are verified at all."""
        algorithm = self.info.get("speculative_algorithm")
        return self.plugin or bool(algorithm) or self.snapshot.passes is not None

    @property
    def drafts(self) -> int | None:
        """Speculative tokens of a request."""
        block = self.info.get("speculative_num_draft_tokens")
        return int(block) - 1 if block else len(self.snapshot.accepted) or None

    def probe(
        self, questions: Sequence[Question], reference_tau: Callable[[], float]
    ) -> Probe | None:
        """Send the questions that Transformers answered.

        Args:
            questions: token ids.
            reference_tau: gives τ of the same texts in Transformers.

        Returns:
            None without a prober, or for a server that does not speculate.
        """
        if self.prober is None or not self.speculates:
            return None
        return self.prober.probe(self.engine, questions, reference_tau())

    def again(self) -> InspectedServer:
        """The same server after its prompts; some facts are told with the first request alone."""
        try:
            return inspect_server(self.prober.client) if self.prober is not None else self
        except ServerError:
            return self


def inspect_server(client: ServerClient, prober: ServerProber | None = None) -> InspectedServer:
    """Read a server's metrics and information.

    Args:
        client: of the server.
        prober: of the same server, to send prompts later.

    Raises:
        ServerError: the server cannot be reached, wants another key, or has neither metrics nor
            ``/server_info``.
    """
    info = client.info() or {}
    missing = None
    try:
        snapshot = client.metrics()
    except ServerError as error:
        if not info:
            raise
        missing = str(error)
        snapshot = MetricsSnapshot(engine="sglang")
    snapshot = with_server_info(snapshot, info)
    model = (client.get_json("/model_info") or {}) if info else {}
    return InspectedServer(client.display_url, snapshot, info, missing, prober, model)


def check_server(
    server: InspectedServer, tau: float, expected: float | None, probe: Probe | None = None
) -> list[Check]:
    """Compare what a server accepts with what the drafter reaches in Transformers.

    Args:
        server: what it tells of itself.
        tau: of this pair in Transformers.
        expected: τ of the training record.
        probe: the same texts on the server; None where no prompt was sent.
    """
    checks = [_engine(server)]
    if not server.speculates:
        return checks
    first = probe.first if probe else None
    if probe is not None and first is not None and first.tau is not None:
        slow = first.tau - 1 < LOW * (probe.reference_tau - 1)
        cut = slow and (first.saved_share or 0.0) >= MANY_SAVED
        checks += [_adaptive(server, cut)[0], _probed(server, probe, first, slow and not cut)]
        checks.append(_repeated(server, probe.repeated, first.tau))
        return [*checks, _traffic(server, first.tau, expected)]
    snapshot = server.snapshot
    reached, passes = snapshot.tau, snapshot.passes
    low = (
        reached is not None
        and (passes is None or passes >= MIN_PASSES)
        and reached - 1 < LOW * (tau - 1)
    )
    adaptive, cut = _adaptive(server, low)
    checks += [adaptive, *([_refused(probe)] if probe else []), _prefix_cache(server, low)]
    return [*checks, _acceptance(server, tau, expected, low and not cut)]


def _engine(server: InspectedServer) -> Check:
    snapshot, info = server.snapshot, server.info
    engine = server.engine
    evidence: dict[str, Any] = {"engine": engine, "plugin": dict(snapshot.drafter)}
    evidence |= {
        key: info[key]
        for key in ("version", "dtype", "quantization", "kv_cache_dtype", "attention_backend")
        if info.get(key) is not None
    }
    check = Check(
        name="server",
        status="ok",
        looked_at=f"/metrics and /server_info of {server.url}",
        finding=f"{engine} drafts with this plugin",
        evidence=evidence,
    )
    if not server.speculates:
        flags = {
            "vllm": "--speculative-method dflash --speculative-model DRAFTER",
            "sglang": "--speculative-algorithm DFLASH --speculative-draft-model-path DRAFTER",
        }
        return check.fault(
            f"{engine} runs without a drafter", f"start it with {flags[engine]}", Certainty.SURE
        )
    if not server.plugin:
        return check.note(f"{engine}'s own speculation runs, not this plugin's", INSTALL)
    if server.missing is not None:
        check.finding += f"; {server.missing}"
    return check


def _adaptive(server: InspectedServer, low: bool) -> tuple[Check, bool]:
    """The check, and whether cut blocks explain a low τ."""
    share = server.snapshot.saved_share
    check = Check(
        name="adaptive verification",
        status="ok",
        looked_at="drafts that were verified and that were left unverified",
        finding="every draft is verified",
    )
    if share is None:
        return check, False
    check.evidence = {
        "verified": server.snapshot.verified,
        "saved": server.snapshot.saved,
        "share_saved": round(share, 3),
        "steps_by_rows": dict(server.snapshot.steps),
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


def _probed(server: InspectedServer, probe: Probe, first: ProbeRound, low: bool) -> Check:
    """The same texts on the server and in Transformers."""
    tau, reference_tau = first.tau or 0.0, probe.reference_tau
    check = Check(
        name="asked acceptance",
        status="ok",
        looked_at="τ of these prompts on the server, against the same texts in Transformers",
        finding=f"τ {tau:.2f} on the server, {reference_tau:.2f} here",
        evidence={
            "tau_served": round(tau, 3),
            "tau_here": round(reference_tau, 3),
            "passes": first.passes,
            "passes_counted": first.counted,
            "same_text": round(first.agreement, 3),
        },
    )
    if first.agreement < MIN_AGREEMENT:
        finding = (
            f"{check.finding}: its target answers otherwise from the first tokens on, so it is "
            "another one, or another revision"
        )
        fix = "give doctor the target that the server runs, or serve this one"
        return check.fault(finding, fix, Certainty.LIKELY) if low else check.note(finding, fix)
    if not low:
        return check
    if not server.plugin:
        return _native(check, f"τ {tau:.2f} on these prompts", reference_tau)
    return check.fault(
        f"the same prompts reach τ {tau:.2f} on the server and {reference_tau:.2f} here, so that "
        "it runs the drafter otherwise than this check does",
        "serve the drafter that is given here; run doctor with the server's --dtype, "
        "--draft-weights and --dialect",
        Certainty.LIKELY,
    )


def _native(check: Check, reached: str, reference_tau: float) -> Check:
    """The fault of an engine's own speculation that accepts less than Transformers does."""
    return check.fault(
        f"the engine's own speculation reaches {reached}, this drafter {reference_tau:.2f} here",
        INSTALL,
        Certainty.LIKELY,
    )


def _repeated(server: InspectedServer, repeated: ProbeRound | None, tau: float) -> Check:
    """The same prompts once more, out of the prefix cache; ``tau`` is that of the first time."""
    check = Check(
        name="prefix cache",
        status="ok",
        looked_at="τ of these prompts when their first tokens come from the prefix cache, against "
        "the first time",
        finding="asking again hit nothing: these prompts are shorter than a cached block, or the "
        "cache is off",
    )
    if repeated is None or repeated.tau is None or not repeated.hit_rate:
        return check
    check.evidence = {
        "hit_rate": round(repeated.hit_rate, 3),
        "tau_first": round(tau, 3),
        "tau_again": round(repeated.tau, 3),
    }
    check.finding = (
        f"τ {repeated.tau:.2f} with {repeated.hit_rate:.0%} of the prompt tokens cached, {tau:.2f} "
        "without"
    )
    if repeated.tau - 1 >= LOW * (tau - 1):
        return check
    if (repeated.saved_share or 0.0) >= MANY_SAVED:
        check.finding += f"; {repeated.saved_share:.0%} of the drafts were left unverified"
        return check
    return check.fault(
        f"{check.finding}: the drafter lacks the features of cached tokens",
        "serve with --no-enable-prefix-caching (SGLang: --disable-radix-cache)"
        + ("" if server.plugin else ", or install dflash-plugin, which keeps the features"),
        Certainty.MEASURED,
        tau - repeated.tau,
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


def _prefix_cache(server: InspectedServer, low: bool) -> Check:
    """Hits of requests that doctor did not send, and that may be drafted worse anyhow."""
    rate = server.snapshot.hit_rate
    check = Check(
        name="prefix cache",
        status="ok",
        looked_at="prompt tokens that came from the prefix cache",
        finding="no hits are counted" if rate is None else f"{rate:.0%} of them",
        evidence={} if rate is None else {"hit_rate": round(rate, 3)},
    )
    if rate is None or rate < MANY_HITS or not low:
        return check
    return check.note(
        f"{rate:.0%} of the prompt tokens come from the prefix cache: the drafter may lack their "
        "features",
        "leave --no-ask out, so that doctor sends its prompts with and without hits",
    )


def _traffic(server: InspectedServer, tau: float, expected: float | None) -> Check:
    """τ of all requests before, against that of these prompts on the same server."""
    snapshot = server.snapshot
    reached, passes = snapshot.tau, snapshot.passes
    check = Check(
        name="served acceptance",
        status="ok",
        looked_at="τ of all requests that the server had before, against these prompts there and "
        "the training record",
        finding="the server had verified nothing before",
        evidence=_evidence(snapshot, expected) | {"tau_asked": round(tau, 3)},
    )
    if reached is None:
        return check
    check.finding = f"τ {reached:.2f} of all requests before, {tau:.2f} of these prompts"
    if passes is not None and passes < MIN_PASSES:
        check.finding += f"; {passes:.0f} verify passes are too few to judge by"
        return check
    if reached - 1 >= LOW * (tau - 1) or (snapshot.saved_share or 0.0) >= MANY_SAVED:
        return check
    finding = (
        f"{check.finding}, so that it is the requests that are drafted worse: they are probably "
        "unlike the training text (chat template, thinking mode, language, high temperature)"
    )
    fix = (
        "run doctor with --data, and --raw or --thinking, on prompts as the server gets them; "
        "train the drafter on such text where that gives no other fault"
    )
    if reached - 1 < LOW_TRAFFIC * (min(tau, expected or tau) - 1):
        return check.fault(finding, fix, Certainty.LIKELY)
    return check.note(finding, fix)


def _evidence(snapshot: MetricsSnapshot, expected: float | None) -> dict[str, Any]:
    return {
        "tau_served": None if snapshot.tau is None else round(snapshot.tau, 3),
        "tau_of_training": expected,
        "passes": snapshot.passes,
        "by_position": [round(rate, 3) for rate in snapshot.acceptance.rates],
        "warnings": snapshot.warnings,
    }


def _acceptance(server: InspectedServer, tau: float, expected: float | None, low: bool) -> Check:
    snapshot = server.snapshot
    reached = snapshot.tau
    check = Check(
        name="served acceptance",
        status="ok",
        looked_at="τ of the server, against τ in Transformers and the training record",
        finding=f"τ {reached or 0:.2f} on the server, {tau:.2f} here",
        evidence=_evidence(snapshot, expected) | {"tau_here": round(tau, 3)},
    )
    if reached is None or (snapshot.passes is not None and snapshot.passes < MIN_PASSES):
        count = int(snapshot.passes or 0)
        return check.model_copy(
            update={
                "status": "unchecked",
                "finding": f"{count} verify passes are too few to judge by",
                "fix": f"send requests until it has verified {MIN_PASSES} blocks",
            }
        )
    if not low:
        return check
    if not server.plugin:
        return _native(check, f"τ {reached:.2f}", tau)
    rates = snapshot.acceptance.rates
    cause = probable_cause(rates) if rates else "no acceptance by position is counted"
    return check.fault(
        f"τ is {reached:.2f} on the server and {tau:.2f} here: {cause}",
        "run doctor with --data on prompts as the server gets them, and with the server's dtype "
        "and quantization",
    )
