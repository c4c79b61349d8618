"""The SGLang tests; they need an environment with SGLang, see ``install.sh``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.helpers.tiny import engine_target
from tests.on_sglang.schedulers import Schedulers


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "versions: runs on every supported version that is there")


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The drafter that this repository ships for SmolLM2."""
    return Path(__file__).parents[2] / "examples" / "smollm2-135m-dflash"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """A tiny target and its directory."""
    directory = tmp_path_factory.mktemp("target")
    return engine_target(directory), directory


@pytest.fixture(scope="session")
def schedulers(tmp_path_factory) -> Iterator[Schedulers]:
    """One warm process for all tests: each of its schedulers is a fork that none comes after."""
    running = Schedulers(tmp_path_factory.mktemp("schedulers") / "log")
    yield running
    running.close()


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory) -> Iterator[Schedulers]:
    """With kernels, under Triton's interpreter."""
    running = Schedulers(tmp_path_factory.mktemp("interpreted") / "log", interpreted=True)
    yield running
    running.close()
