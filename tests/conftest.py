import os
from pathlib import Path

import pytest

from dflash_plugin.errors import DFlashError
from dflash_plugin.fetch import fetch_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct, fetched once."""
    try:
        return fetch_model("smollm2")
    except DFlashError as error:
        if "could not download" in str(error) and not os.environ.get("CI"):
            pytest.skip(f"smollm2 cannot be downloaded here: {error}")
        raise
