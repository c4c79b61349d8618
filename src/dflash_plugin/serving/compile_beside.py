"""Compile Triton kernels in a second process while the engine starts.

The first start on a machine compiles some fifty variants of the kernels, each when it is first
launched. ``compile_beside`` collects launches that will come, without running them, and hands them
to a process of low priority, which compiles them into Triton's cache. The engine then loads what is
there and compiles the rest, as it would without: a failure here costs time only.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

# Kernels of other modules are launched as they are: an engine's may be timed to choose one.
OURS = "dflash_plugin.kernels."
# Variants that the second process compiles at once, and how far it steps back for the engine.
THREADS, NICENESS = 8, 10

logger = logging.getLogger(__name__)


class Launch(NamedTuple):
    """A variant of a kernel, as Triton describes it to ``JITFunction.preload``.

    Attributes:
        module: of the kernel.
        name: of the kernel.
        variant: Triton's JSON of types, constants and options.
    """

    module: str
    name: str
    variant: str


def triton_knobs() -> Any:
    """Triton's settings; None without Triton."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs


@contextmanager
def launches(knobs: Any) -> Iterator[list[Launch]]:
    """Collect the launches of our kernels that would compile, instead of running them.

    What such a launch would have written is left as it is. Kernels that are compiled already run.

    Args:
        knobs: Triton's settings.
    """
    collected: list[Launch] = []
    kept = knobs.runtime.jit_cache_hook

    def collect(*args: Any, **kwargs: Any) -> bool:
        kernel = kwargs["fn"]
        if not kernel.module.startswith(OURS):
            return bool(kept(*args, **kwargs)) if kept is not None else False
        variant = kwargs["compile"]["specialization_data"]
        launch = Launch(kernel.module, kernel.name, variant)
        if launch not in collected:
            collected.append(launch)
        return True

    knobs.runtime.jit_cache_hook = collect
    try:
        yield collected
    finally:
        knobs.runtime.jit_cache_hook = kept


def compile_beside(launch_all: Callable[[], None]) -> subprocess.Popen[bytes] | None:
    """Compile launches into Triton's cache, in a process that nobody waits for.

    Does nothing without Triton, and where Triton interprets kernels.

    Args:
        launch_all: makes the launches, the first ones to come first; they are not run.

    Returns:
        The process, or None where there is nothing to compile or no process could be started.
    """
    knobs = triton_knobs()
    if knobs is None or knobs.runtime.interpret:
        return None
    with launches(knobs) as wanted:
        try:
            launch_all()
        except Exception as error:
            # The engine makes the same launches later.
            logger.warning("some kernels are compiled when they are first launched: %r", error)
    try:
        if not wanted:
            return None
        # Otherwise torch's compiler would move this process's cache when it first runs.
        os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
        return _start(wanted)
    except Exception as error:
        logger.warning("kernels are compiled when they are first launched: %r", error)
        return None


def _start(wanted: Sequence[Launch]) -> subprocess.Popen[bytes]:
    from triton.runtime import driver

    # It takes the same modules, and touches no GPU.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    target = driver.active.get_current_target()
    order = {"target": [target.backend, target.arch, target.warp_size], "launches": wanted}
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(order).encode())
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__],
            stdin=file,
            stdout=subprocess.DEVNULL,
            env=environment,
        )


def main() -> None:
    """Compile the launches that stdin names."""
    os.nice(NICENESS)
    order = json.load(sys.stdin)
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget(*order["target"])
    # What the compiler asks of a device.
    driver.set_active(
        SimpleNamespace(get_current_device=lambda: 0, get_current_target=lambda: target)
    )
    wanted = [Launch(*each) for each in order["launches"]]
    # Once before there are threads.
    modules = {one.module: importlib.import_module(one.module) for one in wanted}
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        jobs = [
            threads.submit(getattr(modules[one.module], one.name).preload, one.variant)
            for one in wanted
        ]
    errors = [error for error in (job.exception() for job in jobs) if error is not None]
    if errors:
        sys.exit(f"{len(errors)} of {len(jobs)} kernels were not compiled ahead: {errors[0]!r}")


if __name__ == "__main__":
    main()
