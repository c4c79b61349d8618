"""A server of SGLang on a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.http_server import HttpServer, free_port, started

# One core a server; processes that fork from its first one (``shim/sitecustomize.py``), and nothing
# compiled by Inductor: imports and compilers take longer than a tiny model runs.
AS_FOR_A_USER = {"FORK_PROCESSES": "", "TORCHDYNAMO_DISABLE": ""}
ENVIRONMENT = {
    **dict.fromkeys(AS_FOR_A_USER, "1"),
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "0"),
}
FLAGS = [
    "--device=cpu",
    "--dtype=float32",
    "--attention-backend=torch_native",
    "--disable-cuda-graph",
    # An idle scheduler would keep a core busy.
    "--sleep-on-idle",
    "--mem-fraction-static=0.3",
    "--max-total-tokens=8192",
    "--max-running-requests=8",
    "--context-length=512",
    "--log-level=info",
]


class Server(HttpServer):
    """A running SGLang."""

    def generate(self, prompt: list[int], rid: str | None = None, **params: Any) -> Any:
        """What ``/generate`` answers to token ids, greedily unless told otherwise."""
        sampling = {"temperature": 0.0, "max_new_tokens": 32, **params}
        body = {"input_ids": prompt, "sampling_params": sampling}
        answer = self.client.post("/generate", json=body if rid is None else {**body, "rid": rid})
        answer.raise_for_status()
        return answer.json()

    def samples(self, prompt: list[int], number: int, **params: Any) -> list[Any]:
        """Answers to one prompt, drawn ``number`` times."""
        return list(self.generate(prompt, n=number, **params))

    def batch(self, prompts: list[list[int]], **params: Any) -> list[Any]:
        """Answers to several prompts, sent at once."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, **params), prompts))

    def info(self) -> dict[str, Any]:
        """The plugin's part of ``/server_info``."""
        answer = self.client.get("/server_info")
        answer.raise_for_status()
        return answer.json()["internal_states"][0]["dflash_plugin"]


def tokens(answers: list[Any]) -> list[list[int]]:
    """Output token ids of answers."""
    return [answer["output_ids"] for answer in answers]


def dflash(drafter: Path) -> list[str]:
    """The flags that the README gives."""
    return ["--speculative-algorithm=DFLASH", f"--speculative-draft-model-path={drafter}"]


def command(target: Path, *flags: str, port: int = 0) -> list[str]:
    serve = [sys.executable, "-m", "sglang.launch_server", f"--model-path={target}"]
    return [*serve, *FLAGS, f"--port={port}", *flags]


@contextmanager
def serving(log: Path, target: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server until the block is left."""
    port = free_port()
    # By itself SGLang before 0.5.23 chooses one that may be taken before it listens. Data-parallel
    # replicas would all take the same.
    replicas = any(flag.startswith("--dp-size") for flag in flags)
    ports = [] if replicas else [f"--nccl-port={free_port()}"]
    serve = command(target, *ports, *flags, port=port)
    with started(Server, serve, port, log, {**ENVIRONMENT, **environment}) as server:
        yield server
