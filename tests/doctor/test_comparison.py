"""When one setting is said to accept more than another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_plugin.doctor.acceptance import BlockAcceptance
from dflash_plugin.doctor.comparison import (
    COSTLY,
    MATTERS,
    NEAR,
    NEARLY,
    SURE,
    Comparison,
    Gain,
    compare,
)

BLOCKS = 160


def accepting(runs: torch.Tensor, drafts: int = 7) -> BlockAcceptance:
    """Blocks whose first ``runs`` drafts are right, four to a stretch, with room for 7 drafts."""
    hits = torch.arange(drafts)[None] < runs[:, None]
    return BlockAcceptance(
        hits, torch.full((len(runs),), 7), torch.arange(len(runs)) // 4
    )  # fmt: skip


def varied(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 5, (BLOCKS,), generator=torch.Generator().manual_seed(seed))


def compared(gain: float, chance: float, base_tau: float = 3.0) -> Comparison:
    accepted = Gain(base_tau, base_tau + gain, 0.01, chance)
    return Comparison(accepted, None, BLOCKS, gain == 0)


def test_a_gain_of_most_blocks_is_more():
    base = varied()
    better = base + (torch.arange(BLOCKS) % 2)
    found = compare(accepting(better), accepting(base))
    assert found.gain == pytest.approx(0.5)
    assert found.chance < SURE
    assert found.judged() == "more"
    assert compare(accepting(base), accepting(better)).judged() == "no more"


def test_two_settings_that_accept_alike_are_not_told_apart():
    """Over a hundred pairs, few come close, and none is decided."""
    judged = [
        compare(accepting(varied(2 * seed)), accepting(varied(2 * seed + 1))).judged()
        for seed in range(100)
    ]
    assert "more" not in judged
    assert judged.count("undecided") <= 2


def test_a_setting_that_changes_nothing_is_known_as_such():
    base = varied()
    found = compare(accepting(base), accepting(base))
    assert found.same
    assert (found.gain, found.error, found.chance) == (0, 0, 1)
    assert not found.may_gain(0.01)


def test_neighboring_blocks_are_one_observation():
    """All of the gain lies in two stretches, which chance gives one time in four."""
    base = varied()
    better = base.clone()
    better[:8] += 2
    found = compare(accepting(better), accepting(base))
    assert 0.2 < found.chance < 0.3
    assert found.judged() == "no more"
    alone = compare(BlockAcceptance(accepting(better).hits), BlockAcceptance(accepting(base).hits))
    assert alone.chance < 0.01


@given(
    gain=st.floats(-1, 1, allow_nan=False),
    chance=st.floats(1e-5, 1),
    base_tau=st.floats(1.1, 8),
)
def test_what_is_significant_is_never_called_no_gain(gain, chance, base_tau):
    needed = max(MATTERS * (base_tau - 1), 0.03)
    judged = compared(gain, chance, base_tau).judged()
    if chance < SURE:
        assert judged != "no more"
    if judged == "more":
        assert chance < SURE
        assert gain >= needed * 0.999
    if chance >= NEAR:
        assert judged == "no more"


@given(base_tau=st.floats(2.1, 8), part=st.floats(1e-6, 0.01))
def test_a_threshold_that_is_missed_by_a_little_is_undecided(base_tau, part):
    needed = MATTERS * (base_tau - 1)
    assert compared(needed * (1 + part), SURE * 0.9, base_tau).judged() == "more"
    assert compared(needed * (1 - part), SURE * 0.9, base_tau).judged() == "undecided"
    assert compared(needed * 2, SURE * (1 + part), base_tau).judged() == "undecided"
    assert compared(needed * NEARLY * (1 + part), NEAR * 0.9, base_tau).judged() == "undecided"


def test_longer_blocks_are_judged_where_the_text_is_long_enough():
    base = accepting(torch.full((BLOCKS,), 7))
    room = torch.where(torch.arange(BLOCKS) < 40, 7, 15)
    short = BlockAcceptance(base.hits, room, base.stretches)
    hits = torch.ones(BLOCKS, 15, dtype=torch.bool)
    hits[:40, 7:] = False  # no tokens to accept there
    found = compare(BlockAcceptance(hits, room, base.stretches), short)
    assert found.blocks == BLOCKS - 40
    assert found.accepted[:2] == (8, 16)


def longer(further: int, worse: int = 0) -> Comparison:
    """Blocks of 15 drafts against 7; every ``further``-th accepts 8 more than those of 7 can.

    Args:
        further: of the blocks.
        worse: blocks that lose their last draft of 7.
    """
    runs = torch.full((BLOCKS,), 3)
    runs[::further] = 7
    more = torch.where(runs == 7, 15, runs)
    more[1 : 1 + 4 * worse : 4] -= 1
    room, stretches = torch.full((BLOCKS,), 15), torch.arange(BLOCKS) // 4
    other, base = (
        BlockAcceptance(torch.arange(drafts)[None] < some[:, None], room, stretches)
        for drafts, some in ((15, more), (7, runs))
    )
    return compare(other, base)


def test_further_drafts_alone_have_to_be_worth_a_lot():
    assert longer(8).judged() == "more"
    assert longer(8).by_length
    little = longer(80)
    assert little.accepted.tokens > MATTERS * (little.accepted.base_tau - 1)
    assert (little.judged(), little.by_length) == ("no more", True)
    assert longer(8, worse=40).leading.tokens < 0


@given(gain=st.floats(0.02, 1), error=st.floats(0.001, 0.2), base_tau=st.floats(2, 5))
def test_further_drafts_that_may_be_worth_it_are_undecided(gain, error, base_tau):
    """No threshold is missed by a little: what may reach it is not decided against."""
    none = Gain(base_tau, base_tau - 0.01, 0.02, 1.0)
    accepted = Gain(base_tau, base_tau + gain, error, SURE / 2)
    judged = Comparison(accepted, None, BLOCKS, False, none).judged()
    needed = COSTLY * (base_tau - 1)
    if gain >= needed:
        assert judged == "more"
    elif gain + 2 * error >= needed:
        assert judged == "undecided"
    else:
        assert judged == "no more"


def test_what_both_draft_decides_where_it_is_better():
    sure = Gain(3.0, 3.2, 0.02, SURE / 2)
    assert Comparison(sure, None, BLOCKS, False, sure).judged() == "more"
    vague = Gain(3.0, 3.1, 0.05, NEAR / 2)
    assert Comparison(sure, None, BLOCKS, False, vague).judged() == "undecided"


def test_few_blocks_may_hide_a_gain():
    vague = Gain(3.0, 3.1, 0.2, 0.3)
    assert Comparison(vague, None, 10, False).may_gain(0.15)
    assert not compared(0.1, 0.3).may_gain(0.15)


def test_probabilities_decide_where_acceptance_varies_too_much():
    """But not against it: a drafter may be sure of what is not accepted."""
    vague, sure = Gain(3.0, 3.2, 0.1, 0.03), Gain(2.0, 2.2, 0.02, SURE / 2)
    assert Comparison(vague, None, BLOCKS, False).judged() == "no more"
    assert Comparison(vague, sure, BLOCKS, False).judged() == "more"
    assert Comparison(Gain(3.0, 2.9, 0.1, 1.0), sure, BLOCKS, False).judged() == "no more"
    assert Comparison(sure, vague, BLOCKS, False).judged() == "more"


def test_the_uncertainty_is_shown():
    assert str(compared(0.2, 1e-5)) == "τ from 3.00 to 3.20 (+0.20 ± 0.02, 160 blocks, p < 0.0002)"
    assert "p 0.0300" in str(compared(0.2, 0.03))
