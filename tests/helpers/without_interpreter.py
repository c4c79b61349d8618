"""Programs of this folder that compile kernels, started from tests that interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a module of ``tests.helpers`` to its end, without Triton's interpreter.

    Args:
        program: the module's name.

    Raises:
        AssertionError: it failed; the message holds the end of what it printed as errors.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"tests.helpers.{program}"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
