"""Acceptance length and rates by position, against counts that can be checked by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dflash_plugin.decoding.acceptance import (
    Acceptance,
    at_least,
    conditional_rates,
    histogram,
    rates,
    tau,
)

# Drafts that five passes of a block of three drafts accepted.
ACCEPTED = [0, 3, 1, 3, 0]


def test_counts_by_position():
    assert histogram(ACCEPTED, 3) == [2, 1, 0, 2]
    assert at_least([2, 1, 0, 2]) == [3, 2, 2]
    assert at_least([4]) == []
    assert rates([3, 2, 2], 5) == [0.6, 0.4, 0.4]
    assert rates([0, 0], 0) == [0.0, 0.0]


def test_conditional_rates_stop_where_no_pass_came():
    assert conditional_rates([0.8, 0.4, 0.0, 0.0]) == [0.8, 0.5, 0.0, None]
    assert conditional_rates([]) == []


def test_tau_counts_the_bonus_token():
    assert tau(12, 5) == 2.4
    assert tau(0, 0) is None
    found = Acceptance.of(ACCEPTED, 3)
    assert (found.passes, found.accepted) == (5, (3, 2, 2))
    assert found.tau == pytest.approx(1 + sum(ACCEPTED) / 5)
    assert found.tau == pytest.approx(1 + sum(found.rates))
    assert found.conditional_rates == pytest.approx([0.6, 2 / 3, 1.0])


def test_no_pass_has_no_rates():
    nothing = Acceptance.of([], 3)
    assert (nothing.tau, nothing.rates, nothing.conditional_rates) == (None, [], [])


def test_a_count_above_the_block_is_refused():
    with pytest.raises(IndexError):
        histogram([4], 3)


def test_importing_it_needs_no_torch():
    """A metrics client reads acceptance on machines without torch."""
    script = "import sys, dflash_plugin.decoding.acceptance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
