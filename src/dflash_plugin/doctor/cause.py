"""Searches all settings, and names the one that explains the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dflash_plugin.doctor.comparison import SURE, compare
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.doctor.trials import Search, Setting, Tell, Trials, Tried

# Settings that are looked at as the one cause.
CANDIDATES = 4
# Share of τ - 1 whose gain few blocks may hide.
HIDDEN = 0.15
# Tokens from which on a gain that may be hidden is told.
SHOWN = 0.005
MORE_PROMPTS = "run doctor with more prompts (--data, --prompts)"


class Cause(NamedTuple):
    """The setting on top of which the others gain nothing.

    Attributes:
        tried: it.
        rivals: others that accept alike, of any check, and on top of which it gains nothing either.
    """

    tried: Tried
    rivals: Sequence[Tried]


def search(trials: Trials, searches: Sequence[Search], tell: Tell = lambda _: None) -> list[Check]:
    """Try every setting, and make one check of each search.

    A setting is right if it gives the known answers and the checkpoint's settings do not. Then no
    other is tried. Without such a one, a setting is a fault's cause if it accepts more beyond
    chance. Of several, the cause is the one on top of which the others gain nothing. While none is
    beyond chance, none explains another.

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
    return [_judged(trials, one, found[one.name], better, cause) for one in searches]


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


def _cause(trials: Trials, better: Sequence[Tried], tell: Tell) -> Cause | None:
    """Of the settings that accept more, the one that leaves nothing to the others."""
    surest = [each for each in better if each.judgement == "more"]
    if not surest:
        return None
    best = max(surest, key=_tau)
    alike = _usual_first(_alike(surest, best))[:CANDIDATES]
    for candidate in alike:
        tell(f"whether it is {candidate.setting.label} alone")
        if all(explained(trials, candidate, other) for other in better if other is not candidate):
            rivals = [
                each
                for each in alike
                if each is not candidate and explained(trials, each, candidate)
            ]
            return Cause(candidate, rivals)
    return Cause(best, [])


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


def _usual_first(several: Sequence[Tried]) -> list[Tried]:
    return sorted(several, key=lambda each: (each.setting.rank, -_tau(each)))


def explained(trials: Trials, cause: Tried, other: Tried) -> bool:
    """Whether a setting accepts no more where the cause is mended already."""
    return trials.on_top(cause.setting, other.setting).judged() == "no more"


def _check(one: Search, tried: Sequence[Tried], evidence: dict[str, Any]) -> Check:
    limits = [c.gain + 2 * c.error for each in tried if (c := each.compared) and not c.same]
    limit = max(limits, default=0.0)
    count = f"{len(tried)} other{'' if len(tried) == 1 else 's'} tried, none better"
    count += f" by more than {limit:.2f}" if limit >= SHOWN else ""
    finding = f"{one.well}: {count if tried else 'no other tried'}"
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


def _judged(
    trials: Trials,
    one: Search,
    tried: Sequence[Tried],
    better: Sequence[Tried],
    cause: Cause | None,
) -> Check:
    """The check of one search; ``better`` are the settings of all that accept more."""
    pairs = [(each.setting.label, each.compared) for each in tried if each.compared]
    evidence: dict[str, Any] = {
        "tau": round(trials.base.tau, 3),
        "gain": {label: round(compared.gain, 3) for label, compared in pairs},
        "standard_error": {label: round(compared.error, 3) for label, compared in pairs},
    }
    check = _check(one, tried, evidence)
    ours = [each for each in tried if each.judgement != "no more"]
    proven = trials.known is not None and not trials.by_record
    if not ours:
        return _unmoved(check, tried, certain=proven or cause is not None)
    if cause is not None and any(each is cause.tried for each in ours):
        shown, alike = cause.tried, _alike(ours, cause.tried)
        alike += [each for each in cause.rivals if each not in alike]
    else:
        surest = [each for each in ours if each.judgement == "more"] or ours
        alike = _usual_first(_alike(surest, max(surest, key=_tau)))
        shown = alike[0]
    assert shown.compared is not None
    finding = f"{shown.setting.label} takes {shown.compared}"
    others = [each.setting.label for each in alike if each is not shown]
    if others:
        check.evidence["alike"] = others
        finding += f"; not told from it: {_some(others)}"
    if cause is not None and shown is not cause.tried and explained(trials, cause.tried, shown):
        return check.note(f"{finding}, and nothing on top of {cause.tried.setting.label}")
    if shown.judgement == "more":
        return check.fault(finding, shown.setting.fix, Certainty.MEASURED, shown.compared.gain)
    if proven:
        return check.note(f"{finding}; the known answers speak for the checkpoint's settings")
    only = all(any(each is own for own in ours) for each in better)
    return check.model_copy(
        update={
            "status": "undecided",
            "finding": f"{finding}: too close to decide",
            # One of several that are close may be the cause of all.
            "fix": MORE_PROMPTS + (f"; if they say the same, {shown.setting.fix}" if only else ""),
        }
    )


def _unmoved(check: Check, tried: Sequence[Tried], *, certain: bool) -> Check:
    """The check of a search of which no setting accepts more.

    Args:
        check: of the search.
        tried: its settings.
        certain: whether it needs no more texts, as another check or the known answers tell enough.
    """
    longer = [
        each
        for each in tried
        if each.compared and each.compared.by_length and each.compared.chance < SURE
    ]
    if longer:
        best = max(longer, key=_tau)
        check = check.note(
            f"{check.finding}; {best.setting.label} takes {best.compared}, which does not tell "
            "what it was trained with"
        )
    hidden = [
        each.setting.label
        for each in tried
        if each.compared and each.judgement == "no more" and each.compared.may_gain(HIDDEN)
    ]
    if hidden and not certain:
        return check.note(
            f"{check.finding}; the texts are too few to rule out {_some(hidden)}", MORE_PROMPTS
        )
    return check
