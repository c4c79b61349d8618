"""Every kernel compiles for an H100 or H200, without a GPU, and keeps its values in registers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import dflash_plugin.kernels
from tests.helpers import without_interpreter

FOLDER = Path(dflash_plugin.kernels.__path__[0])


def test_kernels_compile_without_spilling():
    done = without_interpreter.run("compile_kernels")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    # A cosine of an angle beyond 100,000 has a table of 28 bytes.
    assert [record for record in records if record["stack_bytes"] > 32] == []
    launched = re.compile(r"@triton\.jit[^\n]*\ndef _")
    ops = {path.stem for path in FOLDER.glob("*.py") if launched.search(path.read_text())}
    assert {record["kernel"].partition(".")[0] for record in records} == ops
