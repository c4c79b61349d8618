import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Torch's threads sleep while they wait for each other: spinning threads take the cores from
# whatever else runs, such as another engine's tests. Torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hypothesis import settings

from dflash_plugin.checkpoints.hub import fetch_model

# The same examples in every run; HYPOTHESIS_PROFILE=explore looks for new ones. A slow example is
# no fault: other work may have the cores.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# The tests of an engine run where it is installed.
ENGINES = ("vllm", "sglang")
collect_ignore = [f"on_{name}" for name in ENGINES if find_spec(name) is None]

# Without a GPU the kernels run under Triton's interpreter, which has to be asked for before Triton
# is imported. The engines decide for themselves.
if len(collect_ignore) == len(ENGINES) and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    from tests.helpers import quick_interpreter

    quick_interpreter.turn_on()


def pytest_report_header() -> list[str]:
    return [f"tests/{folder} is left out: its engine is not installed" for folder in collect_ignore]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct, fetched once."""
    return fetch_model("smollm2")


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run, and new tensors are where they do; the interpreter rounds as a GPU does."""
    import triton.runtime.interpreter

    from dflash_plugin import kernels
    from tests.helpers.kernel_helpers import DEVICE, rounded

    monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", rounded)
    with DEVICE, kernels.forced(True):
        yield
