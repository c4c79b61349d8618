"""Cut passes through SGLang's own kernel of the gated delta rule, which a CPU interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_a_cut_pass_gives_what_one_of_whole_blocks_gives_for_its_rows():
    """Outputs, the state behind each row and the convolution's windows, bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE / "shim"), *sys.path])
    # With it SGLang would take kernels that are built for a CPU.
    environment.pop("SGLANG_USE_CPU_ENGINE", None)
    command = [sys.executable, "-W", "ignore", str(HERE / "cut_delta_rule.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "[]"
