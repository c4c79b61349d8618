"""What the vLLM tests share; they need an environment with vLLM, see ``install_cpu.sh``."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here")

# The tests send functions to the worker's process; a small paged cache is enough.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

DRAFTER = Path(__file__).parents[2] / "examples" / "smollm2-135m-dflash"
ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
BLOCK = 32


@contextmanager
def running(target: Path, drafter: Path | None, **settings: Any) -> Iterator[Any]:
    """A float32 engine; without a drafter, the target alone."""
    from vllm import LLM

    speculative = settings.pop("speculative", {})
    if drafter is not None:
        speculative = {"method": "dflash", "model": str(drafter), **speculative}
    engine = LLM(
        str(target),
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        max_num_seqs=8,
        disable_log_stats=False,
        speculative_config=speculative or None,
        **{"max_model_len": 512, **settings},
    )
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def on_worker(engine: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(worker, *args)`` on the engine's one worker."""
    return engine.collective_rpc(function, args=args)[0]


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
