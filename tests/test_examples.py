"""What the examples name of this project is there."""

import importlib
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")])
IMPORT = re.compile(r"from (dflash_plugin[\w.]*) import ([\w, ]+)")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_imports_of_this_project_exist(script):
    for module, names in IMPORT.findall(script.read_text()):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), (module, name)


def test_the_shipped_drafter_is_reached_through_examples():
    shipped = EXAMPLES / "smollm2-135m-dflash"
    assert {path.name for path in shipped.iterdir()} >= {
        "README.md",
        "config.json",
        "known_answer.json",
        "model.safetensors",
    }
