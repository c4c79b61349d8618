"""Compile launches in a second process, for a made-up H200: what this process then compiles.

    python -m tests.helpers.start_compilation

Prints one line of JSON. It needs no GPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dflash_plugin import kernels
from dflash_plugin.kernels.gated_act import gated_act
from dflash_plugin.kernels.quantize_rows import quantize_rows
from dflash_plugin.serving import compile_beside
from dflash_plugin.serving.start_times import StartTimes
from tests.helpers.compile_kernels import Driver, of


@triton.jit
def other_kernel(x, N: tl.constexpr):
    """An engine's."""
    tl.store(x + tl.arange(0, N), 1.0)


def launch() -> None:
    """Three variants of our kernels, the first of them twice."""
    gated_act(of(1, 64))
    gated_act(of(2, 64))
    quantize_rows(of(3, 64))
    gated_act(of(2, 24))


def launch_and_fail() -> None:
    """As many, and an error."""
    launch()
    raise ValueError("no such layer")


def warmups(kernel: JITFunction, grid: tuple[int, ...]):
    """In the place of launches: what compiles, and runs nothing."""
    return lambda *args, **kwargs: kernel.warmup(*args, grid=grid, **kwargs)


def main() -> None:
    os.environ.pop("TRITON_CACHE_DIR", None)
    os.environ["TRITON_HOME"] = tempfile.mkdtemp()
    driver.set_active(Driver())
    JITFunction.__getitem__ = warmups
    times = StartTimes()
    with kernels.forced(True):
        with compile_beside.launches(triton.knobs) as collected:
            launch()
            other = other_kernel[1,](of(16), N=16)
        times.compilations.watch()
        times.compiler = compile_beside.compile_beside(launch_and_fail)
        running = str(times)
        # What torch's compiler does.
        os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
        status = times.compiler.wait()
        so_far = times.compilations.compiled + times.compilations.found
        launch()
        gated_act(of(2, 64, dtype=torch.float32))
        log = str(times)
        unknown = compile_beside.Launch(compile_beside.OURS + "gated_act", "_kernel", "{}")
        times.compiler = compile_beside._start([unknown])
        times.compiler.wait()
        sys.executable = "/no/such/python"
        none = compile_beside.compile_beside(lambda: gated_act(of(2, 64, dtype=torch.float16)))
    record = {
        "collected": [launch.module.rpartition(".")[2] for launch in collected],
        "other_compiles": other is not None,
        "hook_is_back": triton.knobs.runtime.jit_cache_hook is None,
        "status": status,
        "so_far": so_far,
        "compiled": times.compilations.compiled,
        "found": times.compilations.found,
        "running": running,
        "log": log,
        "failed": str(times),
        "without_a_process": none,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
