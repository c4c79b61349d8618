"""An empty directory of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.tables import common


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that tables are made from."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path
