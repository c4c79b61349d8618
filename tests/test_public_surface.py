"""Flags, variables, options, metrics and formats are those of the checked-in list."""

import json
from pathlib import Path

import pytest

from tests.helpers.public_surface import surface

LIST = Path(__file__).parent / "data" / "public_surface.json"


@pytest.mark.parametrize("part", sorted(json.loads(LIST.read_text())))
def test_the_public_surface_is_the_listed_one(part):
    assert surface()[part] == json.loads(LIST.read_text())[part], (
        "a public name or default changed: undo that, or write the list again as "
        "tests/helpers/public_surface.py says and tell users in CHANGELOG.md"
    )


def test_nothing_public_is_missing_in_the_list():
    assert set(surface()) == set(json.loads(LIST.read_text()))
