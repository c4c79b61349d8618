"""The vLLM tests; they need an environment with vLLM, see ``install.sh``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

# The tests send functions to the worker's process; a small paged cache is enough.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if torch.cuda.is_available():
    # The tests use CUDA before the workers start, which forked processes do not survive.
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
else:
    # Inductor takes longer to compile than a tiny model runs.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The drafter that this repository ships for SmolLM2."""
    return Path(__file__).parents[2] / "examples" / "smollm2-135m-dflash"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Any, Path]:
    """A tiny target and its directory."""
    # Torch reads what is set above when it is imported whole.
    from tests.helpers.tiny import engine_target

    directory = tmp_path_factory.mktemp("target")
    return engine_target(directory), directory
