"""Where an engine under test runs; ``FAMILIES_DEVICE`` is "cuda" or "cpu"."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

ON_GPU = os.environ.get("FAMILIES_DEVICE") == "cuda"
# What the table of targets says of one that an engine alone does not run.
NOT_HERE = "not on the GPU" if ON_GPU else "not on a CPU"


def require_plugin(group: str) -> None:
    """End the process if an engine would not find this project among its plugins of ``group``."""
    if not list(entry_points(group=group, name="dflash_plugin")):
        raise SystemExit(f"no plugin dflash_plugin in {group}: pip install -e .")
