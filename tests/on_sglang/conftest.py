"""The SGLang tests; they need an environment with SGLang, see ``install.sh``."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "versions: runs on every supported version that is there")


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The drafter that this repository ships for SmolLM2."""
    return Path(__file__).parents[2] / "examples" / "smollm2-135m-dflash"
