"""An engine in a process of its own, driven over a pipe.

Several of them share a GPU, so that engines can be measured in turns; only one works at a time.
Nothing is imported here that an engine must import first.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class Served:
    """A child process with one engine.

    Args:
        mode: what the results call the engine.
        script: runs in the child and ends in ``answer``.
        settings: the script's argument, as JSON.
        environment: added to this process's.
        log: takes all that the child prints.
    """

    def __init__(
        self,
        mode: str,
        script: str,
        settings: dict[str, Any],
        environment: dict[str, str],
        log: Path,
    ) -> None:
        self.mode = mode
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, script, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env={**os.environ, **environment},
            text=True,
        )

    def wait(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            RuntimeError: the process ended; the message holds the end of its log.
        """
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.mode} ended:\n" + self.log.read_text()[-3000:])
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.wait()

    def close(self) -> None:
        """End the child, by force where it does not end by itself."""
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def fixed_drafts(mode: str) -> int | None:
    """How many drafts a mode's name asks for: 5 of "native-k5"."""
    found = re.search(r"-k(\d+)", mode)
    return None if found is None else int(found[1])


def each(
    sampling: dict[str, Any], prompts: int, seeds: dict[str, list[int]] | None
) -> list[dict[str, Any]]:
    """Sampling parameters of each prompt, which share all but their seeds."""
    return [
        {**sampling, **{name: of_prompts[index] for name, of_prompts in (seeds or {}).items()}}
        for index in range(prompts)
    ]


def claim_stdout() -> TextIO:
    """The child's end of the pipe; what it and its own children print goes to the log."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def answer(pipe: TextIO, started: float, run: Callable[..., dict[str, Any]], **facts: Any) -> None:
    """Say how long the start took and what the engine says of itself, then answer requests."""
    start = {"startup": time.perf_counter() - started, **facts}
    print(json.dumps(start), file=pipe, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=pipe, flush=True)
