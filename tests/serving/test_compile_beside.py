"""A second process compiles what the engine will launch; what fails there costs time only."""

from __future__ import annotations

import json

import pytest

from dflash_plugin.serving.compile_beside import compile_beside
from tests.helpers import without_interpreter


def test_the_engine_finds_compiled_what_a_second_process_has_compiled() -> None:
    done = without_interpreter.run("start_compilation")
    record = json.loads(done.stdout)
    assert record["collected"] == ["gated_act", "quantize_rows", "gated_act"]
    assert record["other_compiles"]
    assert record["hook_is_back"]
    # The error behind the launches ends neither process.
    assert (record["status"], record["so_far"]) == (0, 0)
    # One more variant, which nobody had asked for ahead.
    assert (record["found"], record["compiled"]) == (3, 1)
    assert "1 kernels compiled and 3 loaded in " in record["log"]
    assert record["running"].endswith("; a second process has not ended yet")
    assert record["log"].endswith("; a second process has compiled the others")
    assert record["failed"].endswith("; a second process could not compile all others")
    assert "1 of 1 kernels were not compiled ahead: KeyError('name')" in done.stderr
    assert record["without_a_process"] is None


def test_interpreted_kernels_are_not_launched_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs")
    launched: list[int] = []
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert compile_beside(lambda: launched.append(1)) is None
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert compile_beside(lambda: launched.append(2)) is None
    assert launched == [2]
