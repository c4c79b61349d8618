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

HAS_VLLM = find_spec("vllm") is not None
collect_ignore = [] if HAS_VLLM else ["on_vllm"]


def pytest_report_header() -> str | None:
    return None if HAS_VLLM else "vLLM is not installed: tests/on_vllm is left out"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct, fetched once."""
    return fetch_model("smollm2")
