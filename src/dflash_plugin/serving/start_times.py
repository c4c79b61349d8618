"""How long the plugin's parts of an engine's start take, for one line of the log."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dflash_plugin.serving.compile_beside import OURS, triton_knobs


@dataclass
class Compilations:
    """Kernels of ours that this process has compiled or found compiled since ``watch``.

    Attributes:
        compiled: variants that were compiled.
        found: variants that were in Triton's cache.
        seconds: spent on both.
    """

    compiled: int = 0
    found: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.compiled} kernels compiled and {self.found} loaded in {self.seconds:.1f} s"

    def watch(self) -> None:
        """Count from now on; counts nothing without Triton."""
        knobs = triton_knobs()
        if knobs is None:
            return
        other = knobs.compilation.listener

        def listen(**event: Any) -> None:
            if other is not None:
                other(**event)
            kernel = getattr(event["src"], "fn", None)
            if str(getattr(kernel, "__module__", "")).startswith(OURS):
                self.compiled += not event["cache_hit"]
                self.found += event["cache_hit"]
                self.seconds += event["times"].total / 1e6

        knobs.compilation.listener = listen


class StartTimes:
    """Seconds of the parts of a start, those of compilation included.

    Attributes:
        compilations: since they are watched.
        compiler: the process that compiles ahead, if there is one.
    """

    def __init__(self) -> None:
        self.compiler: subprocess.Popen[bytes] | None = None
        self._seconds: dict[str, float] = {}
        self.compilations = Compilations()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part; its name is what the log says."""
        begin = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - begin
            self._seconds[name] = self._seconds.get(name, 0.0) + took

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {took:.1f}" for name, took in self._seconds.items())
        line = f"seconds of the plugin's parts of the start: {parts}; {self.compilations}"
        if self.compiler is None:
            return line
        ended = {None: "has not ended yet", 0: "has compiled the others"}
        status = ended.get(self.compiler.poll(), "could not compile all others")
        return f"{line}; a second process {status}"
