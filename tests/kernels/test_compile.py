"""Every kernel compiles for an H100 or H200, without a GPU, and keeps its values in registers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import dflash_plugin.kernels

FOLDER = Path(dflash_plugin.kernels.__path__[0])


def test_kernels_compile_without_spilling():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    # A cosine of an angle beyond 100,000 has a table of 28 bytes.
    assert [record for record in records if record["stack_bytes"] > 32] == []
    launched = re.compile(r"@triton\.jit[^\n]*\ndef _")
    ops = {path.stem for path in FOLDER.glob("*.py") if launched.search(path.read_text())}
    assert {record["kernel"].partition(".")[0] for record in records} == ops
