"""The shipped drafter without its known answers, with one setting edited: doctor names it.

The target's answers are written once for all of them.
"""

from __future__ import annotations

import pytest

from dflash_plugin.doctor import diagnose
from tests.doctor.test_doctor import DFLASH2

IDS = [5, 13, 21, 28]


def statuses(found):
    return {check.name: check.status for check in found.checks}


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
    """Where no row sees later ones, a longer block loses nothing and commits a little more."""
    found = diagnose(pair, planted(record=False, is_causal=True))
    assert statuses(found)["block size"] in ("ok", "note")
    assert statuses(found)["window and causality"] in ("fault", "undecided")
    assert "window and causality: the other causality" in found.verdict
    assert "set is_causal to false in" in str(found.fix)


def test_longer_blocks_that_commit_a_little_more_are_no_fault(pair, planted):
    found = diagnose(pair, planted(record=False, of=DFLASH2))
    assert found.exit_code == 0, found.verdict
    assert statuses(found)["block size"] == "note"


def test_two_rope_thetas_that_differ_are_named(pair, planted):
    found = diagnose(pair, planted(record=False, rope_theta=10000.0))
    assert found.exit_code == 1
    assert found.verdict.startswith("configuration: ")
    assert "rope_theta" in found.verdict
    assert "10000" in found.verdict
    assert "100000" in found.verdict
    assert len(found.checks) == 1
