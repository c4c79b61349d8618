"""Searches all settings, and names the one that explains the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dflash_plugin.doctor.comparison import compare
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.doctor.trials import Search, Setting, Tell, Trials, Tried

# Settings that are looked at as the one cause.
CANDIDATES = 4
# Share of τ - 1 whose gain few blocks may hide.
HIDDEN = 0.15
Found = Mapping[str, Sequence[Tried]]


def search(trials: Trials, searches: Sequence[Search], tell: Tell = lambda _: None) -> list[Check]:
    """Try every setting, and make one check of each search.

    A setting is right if it gives the known answers and the checkpoint's settings do not. Then no
    other is tried. Without such a one, a setting is a fault's cause if it accepts more beyond
    chance. Of several, the cause is the one on top of which the others gain nothing.

    Args:
        trials: of the drafter.
        searches: in the order in which they are run.
        tell: called with what is being tried.
    """
    if trials.by_record:
        found = _tried(trials, searches, trials.by_known_answers, tell, " by known answers")
        if any(each.restores for tried in found.values() for each in tried):
            return [_restored(trials, one, found[one.name]) for one in searches]
    found = _tried(trials, searches, trials.by_acceptance, tell)
    better = [each for tried in found.values() for each in tried if each.judgement != "no more"]
    cause = _cause(trials, better, tell)
    return [_judged(trials, one, found[one.name], cause) for one in searches]


def _tried(
    trials: Trials,
    searches: Sequence[Search],
    run: Callable[[Setting], Tried],
    tell: Tell,
    how: str = "",
) -> dict[str, list[Tried]]:
    found: dict[str, list[Tried]] = {}
    for one in searches:
        tried = found[one.name] = []

        def run_all(settings: Sequence[Setting], name: str, tried: list[Tried]) -> None:
            left = trials.distinct(settings, tried)
            for number, setting in enumerate(left, start=1):
                tell(f"{name}{how}: {number} of {len(left)}, {setting.label}")
                tried.append(run(setting))

        run_all(one.settings, one.name, tried)
        if one.finer is not None:
            run_all(one.finer(tried), one.name, tried)
    return found


def _cause(trials: Trials, better: Sequence[Tried], tell: Tell) -> Tried | None:
    """Of the settings that accept more, the one that leaves nothing to the others."""
    surest = [each for each in better if each.judgement == "more"] or better
    if not surest:
        return None
    best = max(surest, key=_tau)
    alike = sorted(_alike(surest, best), key=lambda each: (each.setting.rank, -_tau(each)))
    for candidate in alike[:CANDIDATES]:
        tell(f"whether it is {candidate.setting.label} alone")
        if all(explained(trials, candidate, other) for other in better if other is not candidate):
            return candidate
    return best


def _tau(tried: Tried) -> float:
    assert tried.acceptance is not None
    return tried.acceptance.tau


def _alike(several: Sequence[Tried], best: Tried) -> list[Tried]:
    """Settings that the best one does not accept more than, itself among them."""
    return [
        each
        for each in several
        if each is best
        or (each.acceptance is not None and best.acceptance is not None
            and compare(best.acceptance, each.acceptance).judged() == "no more")
    ]  # fmt: skip


def explained(trials: Trials, cause: Tried, other: Tried) -> bool:
    """Whether a setting accepts no more where the cause is mended already."""
    return trials.on_top(cause.setting, other.setting).judged() == "no more"


def _check(one: Search, tried: Sequence[Tried], evidence: dict[str, Any]) -> Check:
    finding = one.well
    same = [each.setting.label for each in tried if each.compared and each.compared.same]
    blind = [*one.blind, *([f"{_some(same)}: the same drafts on these texts"] if same else [])]
    if blind:
        finding += "; cannot be told: " + "; ".join(blind)
    return Check(
        name=one.name, status="ok", looked_at=one.looked_at, finding=finding, evidence=evidence
    )


def _some(labels: Sequence[str], count: int = 3) -> str:
    rest = len(labels) - count
    return ", ".join(labels[:count]) + (f" and {rest} others" if rest > 0 else "")


def _restored(trials: Trials, one: Search, tried: Sequence[Tried]) -> Check:
    evidence = {
        "tau": round(trials.base.tau, 3),
        "known_drafts_that_agree": {each.setting.label: each.agree for each in tried},
    }
    right = [each for each in tried if each.restores]
    if not right:
        check = _check(one, tried, evidence)
        check.finding = "no other setting gives the known answers, and one of another check does"
        return check
    best = min(right, key=lambda each: each.setting.rank)
    assert best.acceptance is not None
    return _check(one, tried, evidence).fault(
        f"{best.setting.label} takes τ from {trials.base.tau:.2f} to {best.acceptance.tau:.2f} and "
        "gives the known answers",
        best.setting.fix,
        Certainty.SURE,
        best.acceptance.tau - trials.base.tau,
    )


def _judged(trials: Trials, one: Search, tried: Sequence[Tried], cause: Tried | None) -> Check:
    pairs = [(each.setting.label, each.compared) for each in tried if each.compared]
    evidence: dict[str, Any] = {
        "tau": round(trials.base.tau, 3),
        "gain": {label: round(compared.gain, 3) for label, compared in pairs},
        "standard_error": {label: round(compared.error, 3) for label, compared in pairs},
    }
    check = _check(one, tried, evidence)
    better = [each for each in tried if each.judgement != "no more"]
    proven = trials.known is not None and not trials.by_record
    if not better or cause is None:
        hidden = [label for label, compared in pairs if compared.may_gain(HIDDEN)]
        if hidden and not proven and cause is None:
            check.finding += f"; the texts are too few to rule out {_some(hidden)}"
            check.status = "note"
        return check
    if any(each is cause for each in better):
        shown, others = cause, [each for each in _alike(better, cause) if each is not cause]
    else:
        shown, others = max(better, key=_tau), []
    assert shown.compared is not None
    finding = f"{shown.setting.label} takes {shown.compared}"
    if others:
        check.evidence["alike"] = [each.setting.label for each in others]
        finding += f"; not told from it: {_some([each.setting.label for each in others])}"
    if shown is not cause and explained(trials, cause, shown):
        return check.note(f"{finding}, and nothing on top of {cause.setting.label}")
    if shown.judgement == "more":
        return check.fault(finding, shown.setting.fix, Certainty.MEASURED, shown.compared.gain)
    if proven:
        return check.note(f"{finding}; the known answers speak for the checkpoint's settings")
    return check.model_copy(
        update={
            "status": "undecided",
            "finding": f"{finding}: too close to decide",
            "fix": f"run doctor with more prompts (--data, --prompts); if they say the same, "
            f"{shown.setting.fix}",
        }
    )
