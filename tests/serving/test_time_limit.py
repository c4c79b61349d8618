"""A start that stalls ends with the way out, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import time
from dflash_plugin.serving.time_limit import time_limit

with time_limit({limit}, "the part", "OPTION=0"):
    time.sleep({takes})
print("started")
"""


@pytest.mark.parametrize(("limit", "takes", "ends"), [(0.2, 60, True), (60, 0, False)])
def test_a_part_that_stalls_ends_the_process(limit, takes, ends):
    script = SCRIPT.format(limit=limit, takes=takes)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode == 1) is ends
    assert ("the part took more than 0 s: start again with OPTION=0" in done.stderr) is ends
    # Where it stalled.
    assert ('File "<string>", line' in done.stderr) is ends
    assert ("started" in done.stdout) is not ends
