"""Names of modes in tables of speeds."""

from __future__ import annotations

import pytest

from tools.tables.serving import name_of


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("none", "no drafter"),
        ("native-k7", "native, 7 drafts"),
        ("plugin-fp8-adaptive-triton", "plugin, FP8 drafter, adaptive, Triton attention"),
    ],
)
def test_modes_are_named(mode, name):
    assert name_of(mode) == name
