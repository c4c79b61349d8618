"""How often drafts are accepted, by position."""

from __future__ import annotations

import itertools

import pytest

from dflash_plugin.adaptive.acceptance_rates import AcceptanceRates


def test_chances_are_learnt_from_what_was_judged():
    acceptance = AcceptanceRates(3)
    for _ in range(400):
        # The second falls half of the time; the third stands whenever it is judged.
        acceptance.observe(3, [1, 3])
    one, two, three, four = acceptance.expected()
    assert one == 1.0
    assert two == pytest.approx(2.0, abs=0.01)
    assert three == pytest.approx(2.5, abs=0.02)
    assert four == pytest.approx(3.0, abs=0.03)


def test_drafts_that_were_never_verified_are_believed_like_the_one_before():
    acceptance = AcceptanceRates(4)
    for _ in range(500):
        acceptance.observe(1, [0, 1])
    expected = acceptance.expected()
    gains = [b - a for a, b in itertools.pairwise(expected)]
    assert gains[0] == pytest.approx(0.5, abs=0.01)
    assert gains[3] == pytest.approx(0.5**4, abs=0.01)


def test_old_outcomes_fade():
    acceptance = AcceptanceRates(1)
    for _ in range(2000):
        acceptance.observe(1, [1] * 64)
    for _ in range(2000):
        acceptance.observe(1, [0] * 64)
    assert acceptance.expected()[1] < 1.02
