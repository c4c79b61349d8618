"""The command that runs families of targets on a device, with one of them on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_one(engine: str, family: str, place: Path) -> dict[str, Any]:
    """What the command records of a family on an engine of this environment.

    Args:
        engine: "vllm" or "sglang".
        family: by its name in the table.
        place: a directory for the record.
    """
    record = place / "record.json"
    command = [sys.executable, "tools/targets.py", "--device=cpu", f"--engine={engine}"]
    done = subprocess.run(
        [*command, f"--family={family}", f"--output={record}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    about = found["engines"].pop(engine)
    assert found["engines"] == {}
    assert about["device"] == "CPU"
    assert engine in about["versions"].lower()
    (row,) = found["families"]
    assert row["family"] == family
    outcome: dict[str, Any] = row[engine]
    assert outcome.pop("seconds") > 0
    return outcome
