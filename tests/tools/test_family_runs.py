"""Families run apart: what ends or holds up one leaves the others alone."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path

import pytest

from tools.family_runs import Runs, write_metadata

# The engine of these tests does what a family's name says.
PROGRAM = """
import json, os, pathlib, subprocess, sys, time

family, attempt, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
print("running", family, flush=True)
if family == "hangs":
    # What it has started holds the log open, too.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(60)
if family == "raises":
    raise RuntimeError("CUDA ran out | of\\nmemory")
if family == "dies":
    os._exit(7)
found = {"text": "equal", "device": os.environ["FAMILIES_DEVICE"], "attempt": attempt}
if family == "twice":
    found |= {"tries_next": attempt == 0, "message": "a | b\\n c"}
(directory / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "engine_of_tests.py").write_text(PROGRAM)
    return Runs(
        "cpu", jobs=3, limit=8, where={"one": packages, "two": packages}, logs=tmp_path / "logs",
        program=lambda _: "engine_of_tests",
    )  # fmt: skip


def test_one_familys_end_does_not_end_the_others(runs, tmp_path):
    found = {}
    began = time.monotonic()
    families = ("hangs", "raises", "dies", "works", "twice")
    runs.all(["one", "two"], families, lambda *pair_and: found.update({pair_and[:2]: pair_and[2]}))
    # Both engines wait for the family that hangs at the same time.
    assert time.monotonic() - began < 2 * 8
    assert set(found) == {(engine, family) for engine in ("one", "two") for family in families}
    for engine in ("one", "two"):
        assert found[engine, "hangs"]["text"] == "fails"
        assert found[engine, "hangs"]["message"] == "it did not end within 8 s: running hangs"
        assert found[engine, "raises"]["text"] == "fails"
        assert found[engine, "raises"]["message"].endswith("RuntimeError: CUDA ran out / of")
        assert found[engine, "dies"]["message"] == "the process ended (7): running dies"
        assert found[engine, "works"].pop("seconds") >= 0
        assert found[engine, "works"] == {"text": "equal", "device": "cpu", "attempt": 0}
        assert found[engine, "twice"].pop("seconds") >= 0
        assert found[engine, "twice"] == {
            "text": "equal", "device": "cpu", "attempt": 1, "message": "a / b c"
        }  # fmt: skip
    assert (tmp_path / "logs" / "one-twice-1.log").read_text() == "running twice\n"


def test_an_engine_that_is_not_there_fails_with_its_error():
    found = Runs("cpu", program="no_such_engine_{}".format).one("vllm", "Llama")
    assert found["text"] == "fails"
    assert "No module named no_such_engine_vllm" in found["message"]


def test_engines_find_the_plugin_without_an_installation(tmp_path):
    found = {
        (point.group, point.value)
        for distribution in metadata.distributions(path=[str(write_metadata(tmp_path / "there"))])
        for point in distribution.entry_points
    }
    assert found == {
        ("vllm.general_plugins", "dflash_plugin.vllm:register"),
        ("sglang.srt.plugins", "dflash_plugin.sglang:register"),
    }
