import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from dflash_plugin.fetch import fetch_model

# The same examples in every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# The tests of an engine run where it is installed.
ENGINES = ("vllm", "sglang")
collect_ignore = [f"on_{name}" for name in ENGINES if find_spec(name) is None]


def pytest_report_header() -> list[str]:
    return [f"tests/{folder} is left out: its engine is not installed" for folder in collect_ignore]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct, fetched once."""
    return fetch_model("smollm2")
