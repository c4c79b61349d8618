"""What the policy expects of passes over trees, from their outcomes, and what it chooses by it."""

import random

import pytest

from dflash_plugin.adaptive.acceptance_rates import PRIOR, AcceptanceRates
from dflash_plugin.adaptive.policy import VerifyLenPolicy
from dflash_plugin.adaptive.tree_tokens import TreeTokens, reached

# Of a chain of 3: its rows are 1 to 3, the rows beside it follow.
PATHS = [[1, 2, 3], [1, 4], [5, 7], [], [1, 9, 10]]


@pytest.mark.parametrize(("last_row", "depths"), [(3, [3, 1, 0, 0, 1]), (7, [3, 2, 2, 0, 1])])
def test_how_far_fewer_rows_would_have_got(last_row, depths):
    assert [reached(path, last_row) for path in PATHS] == depths


def test_a_pass_judges_all_smaller_trees():
    tokens, chain = TreeTokens(3, (4, 8, 16)), AcceptanceRates(3)
    chain.observe(3, [3, 1, 0, 0, 1])
    tokens.observe_trees(8, PATHS)
    found = tokens.expected()
    assert found[:4] == chain.expected()
    whole = found[3]
    assert found[4:7] == [whole] * 3
    assert found[7] == pytest.approx(whole + 3 / (5 + PRIOR))
    assert found[11] == pytest.approx(whole + 5 / (5 + PRIOR))
    # Nothing is known of sixteen rows, but that they hold the eight.
    assert found[19] == found[11]
    assert len(found) == 20


@pytest.mark.parametrize(
    ("row_seconds", "gain", "best"),
    [
        pytest.param(0.0, 0.3, 40, id="free rows"),
        pytest.param(3e-4, 0.3, 8, id="dear rows"),
        pytest.param(5e-5, 0.0, 8, id="nothing gained"),
    ],
)
def test_trees_are_chosen_where_they_pay(row_seconds, gain, best):
    """The tree holds the sibling of a rejected draft with probability ``gain``."""
    noise, now = random.Random(0), 0.0
    tokens = TreeTokens(7, (8, 16, 32))
    policy = VerifyLenPolicy((1, 2, 4, 6, 8, 16, 24, 40), (1,), expected=tokens.expected, block=8)
    chosen = []
    for _ in range(6000):
        rows = policy.choose(1, now)
        now += 0.01 + row_seconds * rows
        whole = min(rows, 8) - 1
        accepted = next((k for k in range(whole) if noise.random() > 0.75), whole)
        if rows > 8:
            path = list(range(1, accepted + 1))
            if accepted < 7 and noise.random() < gain:
                path.append(20)
            tokens.observe_trees(rows - 8, [path])
        else:
            tokens.observe_chain(rows - 1, [accepted])
        chosen.append(rows)
    late = chosen[2000:]
    assert sum(rows == best or (best == 40 and rows > 8) for rows in late) > 0.85 * len(late)
