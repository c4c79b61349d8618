"""Which of several settings that accept more is named, over blocks that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from dflash_plugin.doctor.cause import search
from dflash_plugin.doctor.comparison import compare
from dflash_plugin.doctor.report import Check, Diagnosis
from dflash_plugin.doctor.trials import Search, Setting, Tried
from tests.doctor.test_comparison import accepting, varied

BASE = varied()
EVERY = torch.arange(len(BASE))


class MadeUp:
    """Trials whose settings accept so many drafts more; a pair is as good as the better of it."""

    by_record = False
    known = None

    def __init__(self, gains: dict[str, torch.Tensor], adds: Sequence[str] = ()) -> None:
        self.gains, self.adds = gains, adds
        self.base = accepting(BASE)
        self.ran: list[str] = []

    def distinct(self, settings, tried):
        return list(settings)

    def by_acceptance(self, setting):
        self.ran.append(setting.label)
        accepted = accepting(BASE + self.gains[setting.label])
        return Tried(setting, compare(accepted, self.base), accepted)

    def on_top(self, one, other):
        ours, theirs = self.gains[one.label], self.gains[other.label]
        both = ours + theirs if other.label in self.adds else ours
        return compare(accepting(BASE + both), accepting(BASE + ours))


def setting(label: str, rank: int = 1) -> Setting:
    return Setting(label, SimpleNamespace(), f"fix {label}", rank)


def diagnosed(trials: MadeUp, *searches: Search) -> Diagnosis:
    return Diagnosis(target="", drafter="", checks=search(trials, searches))


def by_name(found: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in found.checks}


def one(name: str, *settings: Setting, **more) -> Search:
    return Search(name, name, settings, f"{name} is fine", **more)


def test_a_setting_that_helps_by_the_way_is_no_second_fault():
    gains = {"size": (EVERY % 2).long(), "causality": (EVERY % 3 == 0).long()}
    trials = MadeUp(gains)
    found = diagnosed(
        trials, one("window", setting("causality")), one("block", setting("size"))
    )  # fmt: skip
    assert [check.name for check in found.faults] == ["block"]
    assert found.fix == "fix size"
    assert by_name(found)["window"].status == "note"
    assert "nothing on top of size" in by_name(found)["window"].finding


def test_two_faults_are_both_named():
    gains = {"size": (EVERY % 2).long(), "causality": (EVERY % 3 == 0).long()}
    found = diagnosed(
        MadeUp(gains, adds=["causality", "size"]),
        one("window", setting("causality")), one("block", setting("size")),
    )  # fmt: skip
    assert [check.name for check in found.faults] == ["block", "window"]


def test_of_settings_that_accept_alike_the_usual_one_is_named():
    gains = {"9": (EVERY % 2).long(), "8": (EVERY % 2).long(), "4": -(EVERY % 2).long()}
    sizes = [setting("9", 2), setting("8", 0), setting("4", 0)]
    block = by_name(diagnosed(MadeUp(gains), one("block", *sizes)))["block"]
    assert block.fix == "fix 8"
    assert block.evidence["alike"] == ["9"]
    assert "not told from it: 9" in block.finding


def test_a_small_gain_beyond_chance_is_neither_healthy_nor_a_fault():
    gains = {"size": (EVERY % 40 == 0).long()}
    many = MadeUp(gains)
    many.base = accepting(BASE.repeat(8))
    many.by_acceptance = lambda each: Tried(
        each,
        compare(accepting((BASE + gains["size"]).repeat(8)), many.base),
        accepting((BASE + gains["size"]).repeat(8)),
    )
    found = diagnosed(many, one("block", setting("size")))
    assert found.verdict.startswith("undecided: block: size takes τ from")
    assert found.exit_code == 2
    assert "more prompts" in str(found.fix)
    many.known = object()  # Known answers that the checkpoint gives speak for its settings.
    assert diagnosed(many, one("block", setting("size"))).exit_code == 0


def test_of_two_settings_that_are_close_none_is_pointed_at():
    """Neither is a note because of the other, and the fix is to ask more."""
    gains = {"size": (EVERY % 40 == 0).long(), "causality": (EVERY % 32 == 0).long()}
    many = MadeUp(gains)
    many.base = accepting(BASE.repeat(8))

    def tried(each):
        accepted = accepting((BASE + gains[each.label]).repeat(8))
        return Tried(each, compare(accepted, many.base), accepted)

    many.by_acceptance = tried
    found = diagnosed(many, one("block", setting("size")), one("window", setting("causality")))
    assert {check.status for check in found.checks} == {"undecided"}
    assert "block: size takes" in found.verdict
    assert "; or window: causality takes" in found.verdict
    assert "more prompts" in str(found.fix)
    assert "fix " not in str(found.fix)


def test_a_setting_of_another_check_that_explains_as_much_is_named():
    gains = {"size": (EVERY % 2).long(), "causality": (EVERY % 2).long()}
    found = diagnosed(
        MadeUp(gains), one("window", setting("causality")), one("block", setting("size", 0))
    )
    assert [check.name for check in found.faults] == ["block"]
    assert "not told from it: causality" in found.verdict


def test_a_check_claims_no_more_than_it_tried():
    gains = {"long": -(EVERY % 2).long(), "short": -(EVERY % 2).long()}
    some = diagnosed(MadeUp(gains), one("size", setting("long"), setting("short")), one("anchor"))
    assert [check.finding for check in some.checks] == [
        "size is fine: 2 others tried, none better",
        "anchor is fine: no other tried",
    ]
    hides = MadeUp({"size": (EVERY % 9 == 0).long() - (EVERY % 8 == 0).long()})
    finding = diagnosed(hides, one("size", setting("size"))).checks[0].finding
    compared = hides.by_acceptance(setting("size")).compared
    limit = compared.gain + 2 * compared.error
    assert limit > 0
    assert finding.startswith(f"size is fine: 1 other tried, none better by more than {limit:.2f}")


def test_what_the_texts_cannot_tell_is_said():
    gains = {"long window": torch.zeros_like(BASE)}
    found = diagnosed(
        MadeUp(gains), one("window", setting("long window"), blind=["windows of 99 positions"])
    )
    assert found.exit_code == 0
    assert found.checks[0].finding == (
        "window is fine: 1 other tried, none better; cannot be told: windows of 99 positions; long "
        "window: the same drafts on these texts"
    )


def test_a_search_goes_on_around_its_best_settings():
    gains = {"8": torch.zeros_like(BASE), "20": (EVERY % 4 == 0).long(), "21": (EVERY % 2).long()}
    seen: list[list[str]] = []

    def finer(tried):
        seen.append([each.setting.label for each in tried])
        return [setting("21")]

    found = diagnosed(MadeUp(gains), one("layers", setting("8"), setting("20"), finer=finer))
    assert seen == [["8", "20"]]
    assert found.fix == "fix 21"
