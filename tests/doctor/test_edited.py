"""The shipped drafter without its known answers, with one setting edited: doctor names it.

The target's answers are written once for all of them.
"""

from __future__ import annotations

import pytest

from dflash_plugin.doctor import diagnose
from tests.doctor.test_doctor import DFLASH2

IDS = [5, 13, 21, 28]


@pytest.mark.parametrize(
    ("name", "changes", "fix"),
    [
        ("block size", {"block_size": 16}, "set block_size to 8 in"),
        ("block size", {"block_size": 4}, "set block_size to 8 in"),
        (
            "target layers",
            {"draft": {"target_layer_ids": [i - 1 for i in IDS]}},
            f"set target_layer_ids to {IDS} in",
        ),
        (
            "target layers",
            {"draft": {"target_layer_ids": [5, 13, 21, 10]}},
            f"set target_layer_ids to {IDS} in",
        ),
    ],
    ids=["block 16", "block 4", "ids - 1", "one id"],
)
def test_the_edited_setting_is_the_one_cause(pair, planted, name, changes, fix):
    found = diagnose(pair, planted(record=False, **changes))
    assert [check.name for check in found.faults] == [name], found.verdict
    assert fix in str(found.fix)
    assert "±" in found.verdict
    assert found.exit_code == 1


def test_causality_is_not_taken_for_a_short_block(pair, planted):
    """Where no row sees later ones, a longer block loses nothing and commits a little more.

    So few texts hardly tell causality. Doctor names it, or says how much it may hide.
    """
    found = diagnose(pair, planted(record=False, is_causal=True))
    assert {check.name for check in found.faults} <= {"window and causality"}
    assert "block size" not in found.verdict
    attention = next(check for check in found.checks if check.name == "window and causality")
    named = "set is_causal to false in" in str(attention.fix)
    assert named or "none better by more than" in attention.finding


def test_longer_blocks_that_commit_more_are_no_fault_of_themselves(pair, planted):
    found = diagnose(pair, planted(record=False, of=DFLASH2))
    assert not found.faults, found.verdict
    size = next(check for check in found.checks if check.name == "block size")
    assert size.status in ("note", "undecided")
    assert "by its further drafts alone" in size.finding


def test_two_rope_thetas_that_differ_are_named(pair, planted):
    found = diagnose(pair, planted(record=False, rope_theta=10000.0))
    assert found.exit_code == 1
    assert found.verdict.startswith("configuration: ")
    assert "rope_theta" in found.verdict
    assert "10000" in found.verdict
    assert "100000" in found.verdict
    assert len(found.checks) == 1
