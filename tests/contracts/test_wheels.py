"""The check against a wheel can fail, and a wheel that is missing is not passed over in silence."""

from __future__ import annotations

import zipfile

import pytest

from dflash_plugin.serving.engine_source import check_source
from dflash_plugin.serving.engine_surface import Seam
from tests.contracts.wheels import GIVEN, unpacked

SOURCE = """
class Runner:
    def __init__(self, config):
        self.config = config

    def run(self, batch, extra=None):
        pass
"""
TABLE = [
    Seam("toy.core", "Runner.run", "patch", "serve", "a test", ("batch", "extra")),
    Seam("toy.core", "Runner.config", "attribute", "serve", "a test"),
]


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of wheels, to be filled."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv(GIVEN, str(folder))
    return folder


def write_wheel(folder, version, source):
    with zipfile.ZipFile(folder / f"toy_cpu-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy/__init__.py", "")
        wheel.writestr("toy/core.py", source)
        wheel.writestr("toy/kernels.so", "not source")
        wheel.writestr("other/core.py", "")


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("", "", []),
        ("def run", "def execute", ["Runner.run"]),
        ("batch, extra", "extra, batch", ["Runner.run"]),
        ("extra=None", "extra=None, more=None", ["Runner.run"]),
        ("self.config =", "self.settings =", ["Runner.config"]),
        ("class Runner", "class Renamed", ["Runner.run", "Runner.config"]),
    ],
)
def test_what_changed_in_a_wheel_is_named(wheels, tmp_path, old, new, wrong):
    write_wheel(wheels, "1.2.0", SOURCE.replace(old, new))
    root = unpacked("toy", ("toy", "toy_cpu"), "1.2", tmp_path / "source")
    assert sorted(path.name for path in root.rglob("*.*")) == ["__init__.py", "core.py"]
    lines = check_source(root, TABLE, "1.2.0")
    assert [line.split(" ")[0] for line in lines] == [f"toy.core.{symbol}" for symbol in wrong]


def test_a_missing_wheel_fails_where_wheels_were_given(wheels, tmp_path, monkeypatch):
    write_wheel(wheels, "1.20.0", SOURCE)
    with pytest.raises(pytest.fail.Exception, match=r"no wheel of toy 1\.2 in "):
        unpacked("toy", ("toy_cpu",), "1.2", tmp_path)
    monkeypatch.delenv(GIVEN)
    with pytest.raises(pytest.skip.Exception, match=r"download\.sh"):
        unpacked("toy", ("toy_cpu",), "1.2", tmp_path)
