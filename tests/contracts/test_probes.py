"""Whether an engine's object has an attribute is a row of the adapter's table, and no guess.

``getattr`` with a default and ``hasattr`` stand in ``surface.py`` and ``compat.py`` alone.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dflash_plugin

ADAPTERS = Path(dflash_plugin.__file__).parent
ALLOWED = ("surface.py", "compat.py")


def probes(source: str) -> list[str]:
    """The calls that guess, as "line: call"."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) > 2))
    ]


@pytest.mark.parametrize("adapter", ["vllm", "sglang"])
def test_an_adapter_does_not_guess(adapter):
    files = sorted(path for path in (ADAPTERS / adapter).rglob("*.py") if path.name not in ALLOWED)
    assert files
    found = {file.name: probes(file.read_text()) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_guesses_are_found():
    source = "a = getattr(x, 'b', None)\nc = getattr(x, n)\nif hasattr(x, 'd'):\n    pass\n"
    assert probes(source) == ["1: getattr(x, 'b', None)", "3: hasattr(x, 'd')"]
