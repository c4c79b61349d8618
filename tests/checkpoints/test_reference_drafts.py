"""Which drafts of a known answer count."""

from __future__ import annotations

import pytest

from dflash_plugin.checkpoints.reference_drafts import ReferenceDraft, compare

EXPECTED = ReferenceDraft(
    prompt=[1], anchor=2, drafts=[5, 6, 7, 8], margins=[9.0, 0.1, 9.0, 9.0], hidden=[]
)


@pytest.mark.parametrize(
    ("drafts", "apart", "walked"),
    [
        ([5, 6, 7, 8], (3, []), (3, [])),
        # Behind a draft that nothing decided, a path may go elsewhere.
        ([5, 0, 0, 0], (3, [2, 3]), (1, [])),
        ([0, 6, 7, 0], (3, [0, 3]), (1, [0])),
        ([5, 6, 0, 8], (3, [2]), (2, [2])),
    ],
)
def test_a_path_counts_up_to_where_it_differs(drafts, apart, walked):
    assert compare(EXPECTED, drafts, 0.5, walked=False) == apart
    assert compare(EXPECTED, drafts, 0.5, walked=True) == walked
