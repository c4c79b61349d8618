"""Starting engines and servers, and looking into them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.http_server import HttpServer, free_port, started
from tests.on_vllm.forking import forking

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
BLOCK = 32
# Tokens of an answer.
TOKENS = 32
FLAGS = [
    "--dtype=float32",
    "--enforce-eager",
    f"--block-size={BLOCK}",
    "--max-model-len=512",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=96",
    "--enable-prompt-tokens-details",
]


@contextmanager
def running(target: Path, drafter: Path | None, **settings: Any) -> Iterator[Any]:
    """A float32 engine; without a drafter, the target alone."""
    from vllm import LLM

    speculative = settings.pop("speculative", {})
    if drafter is not None:
        speculative = {"method": "dflash", "model": str(drafter), **speculative}
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_num_seqs": 8,
        "max_model_len": 512,
        # Kernels and first passes run over as many rows, which interpreted take longer than a test.
        "max_num_batched_tokens": max(512, 16 * settings.get("max_num_seqs", 8)),
        "disable_log_stats": False,
        "speculative_config": speculative or None,
        **settings,
    }
    with forking():
        engine = LLM(str(target), **settings)
        try:
            yield engine
        finally:
            # At once: nothing is under way, and vLLM would wait for its processes in vain.
            engine.llm_engine.engine_core.shutdown(timeout=0)
            del engine
            gc.collect()


def on_worker(engine: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(worker, *args)`` on the engine's first worker."""
    return engine.collective_rpc(function, args=args)[0]


def counter(engine: Any, name: str) -> Any:
    """One of vLLM's metrics."""
    found = {metric.name: metric for metric in engine.get_metrics()}[name]
    return getattr(found, "values", None) or found.value


class Server(HttpServer):
    """A running vLLM."""

    def complete(self, prompt: list[int], **settings: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": TOKENS, **settings}
        answer = self.client.post("/v1/completions", json=body)
        answer.raise_for_status()
        return answer.json()

    def text(self, prompt: list[int], **settings: Any) -> str:
        return self.complete(prompt, **settings)["choices"][0]["text"]

    def batch(self, prompts: list[list[int]]) -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.text, prompts))


def command(target: Path, *flags: str, port: int = 0, forks: bool = True) -> list[str]:
    """``vllm serve``, whose processes fork; or the command itself."""
    vllm = [str(Path(sys.executable).with_name("vllm"))]
    if forks:
        vllm = [sys.executable, str(Path(__file__).with_name("forking.py"))]
    return [*vllm, "serve", str(target), *FLAGS, f"--port={port}", *flags]


@contextmanager
def serving(
    log: Path, target: Path, *flags: str, forks: bool = True, **environment: str
) -> Iterator[Server]:
    port = free_port()
    serve = command(target, *flags, port=port, forks=forks)
    with started(Server, serve, port, log, environment) as server:
        yield server
