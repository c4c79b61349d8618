from pathlib import Path

import pytest

from dflash_plugin.fetch import fetch_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct, fetched once."""
    return fetch_model("smollm2")
