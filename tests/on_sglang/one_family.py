"""What SGLang does with one family of targets, on a GPU or a CPU, for ``tools/family_runs.py``.

python -m tests.on_sglang.one_family FAMILY ATTEMPT DIRECTORY

``FAMILIES_DEVICE`` is "cuda" or "cpu". The outcome goes to DIRECTORY/found.json. Where SGLang alone
does not run the family, the next attempt, from 0 on, is in another dtype or on another attention
back end; "tries_next" says whether there is one.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.helpers.device import NOT_HERE, ON_GPU, require_plugin
from tests.helpers.families import FAMILIES, Family
from tests.on_sglang.schedulers import FreshSchedulers
from tests.on_sglang.sglang_server import ENVIRONMENT
from tests.on_sglang.target_families import Attempt, gpu_attempts, outcome

ROOT = Path(__file__).parents[2]
FLOAT32 = ROOT / "benchmarks" / "sglang_float32"


def attempts_of(family: Family) -> list[Attempt]:
    """How to try a family here, one way after the other."""
    return gpu_attempts(family) if ON_GPU else [Attempt()]


def environment(attempt: Attempt) -> dict[str, str]:
    """Of the engines' processes."""
    if not ON_GPU:
        return ENVIRONMENT
    found = {
        # Without its FlashInfer; what Inductor would compile runs as it is.
        "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
        "TORCHDYNAMO_DISABLE": "1",
        # The core drafts with the checkpoint's weights.
        "DFLASH_PLUGIN_DRAFT_WEIGHTS": "checkpoint",
    }
    if attempt.dtype == "float32":
        # Triton's products of float32 would be rounded to TF32.
        found["TRITON_F32_DEFAULT"] = "ieee"
    return found


def found(family: Family, attempt: Attempt, place: Path) -> dict[str, Any]:
    """The outcome, as docs/targets.md explains it, with the back end."""
    attention: list[str] = []
    log = place / "schedulers.log"
    if ON_GPU and attempt.dtype == "float32":
        # A plugin of SGLang's, which its processes find by the path.
        sys.path.insert(0, str(FLOAT32))
    schedulers = FreshSchedulers(log, environment(attempt))
    made: dict[str, Any] = outcome(schedulers, family, place, attempt, attention)
    return {**made, "attention": ", ".join(attention)}


def main() -> None:
    name, number, place = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    require_plugin("sglang.srt.plugins")
    os.environ["DFLASH_PLUGIN_CACHE"] = str(place / "staged")
    family = next(family for family in FAMILIES if family.name == name)
    attempts = attempts_of(family)
    try:
        made = found(family, attempts[number], place)
    except Exception as error:  # Whatever ends it is what is recorded.
        traceback.print_exc()
        made = {"text": "fails", "message": f"{type(error).__name__}: {error}"}
    log = place / "schedulers.log"
    if log.exists():
        print(log.read_text(errors="replace"), flush=True)
    made["versions"] = (
        f"sglang {version('sglang')}, transformers {version('transformers')}, "
        f"torch {torch.__version__}"
    )
    made["tries_next"] = made["text"] == NOT_HERE and number + 1 < len(attempts)
    (place / "found.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
