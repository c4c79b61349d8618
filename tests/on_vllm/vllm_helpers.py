"""Starting engines and looking into them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_num_seqs": 8,
            "max_model_len": 512,
            "disable_log_stats": False,
            "speculative_config": speculative or None,
            **settings,
        },
    )
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def on_worker(engine: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(worker, *args)`` on the engine's first worker."""
    return engine.collective_rpc(function, args=args)[0]


def counter(engine: Any, name: str) -> Any:
    """One of vLLM's metrics."""
    found = {metric.name: metric for metric in engine.get_metrics()}[name]
    return getattr(found, "values", None) or found.value
