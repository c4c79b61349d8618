"""What vLLM does with one family of targets, on a GPU or a CPU, for ``tools/family_runs.py``.

python -m tests.on_vllm.one_family FAMILY ATTEMPT DIRECTORY

``FAMILIES_DEVICE`` is "cuda" or "cpu". The outcome goes to DIRECTORY/found.json. Where vLLM alone
does not run the family, the next attempt, from 0 on, is in another dtype; "tries_next" says whether
there is one.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.helpers.device import NOT_HERE, ON_GPU, require_plugin
from tests.helpers.families import Family
from tests.helpers.gpu_families import NoTinyModelError
from tests.on_vllm import torch_routing

# On a GPU, the runner that vLLM has there by default; and PyTorch's sampler.
GPU_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Triton's products of float32 would be rounded to TF32.
    "TRITON_F32_DEFAULT": "ieee",
    **torch_routing.ENVIRONMENT,
}
# What vLLM's modules read when they are imported.
if ON_GPU:
    os.environ |= GPU_ENVIRONMENT

from tests.on_vllm import target_families  # noqa: E402


def found(name: str, dtype: str, place: Path) -> dict[str, Any]:
    """The outcome, as docs/targets.md explains it, with the back ends and what stood in."""
    attention: list[str] = []
    try:
        outcome = target_families.found(family_of(name), place, dtype, attention)
    except NoTinyModelError as error:
        outcome = {"text": "not run", "message": str(error)}
    except Exception as error:  # Whatever ends it is what is recorded.
        traceback.print_exc()
        started = (place / target_families.SERVED).exists()
        outcome = {
            "text": "differs" if started else NOT_HERE,
            "message": target_families.told(error),
        }
    return {**outcome, "attention": ", ".join(attention)}


def main() -> None:
    name, attempt, place = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    require_plugin("vllm.general_plugins")
    dtypes = target_families.dtypes(family_of(name))
    os.environ |= target_families.ENVIRONMENT
    os.environ["DFLASH_PLUGIN_CACHE"] = str(place / "staged")
    if find_spec("torchvision") is None or not ON_GPU:
        target_families.without_torchvision()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    stands_in = ON_GPU and torch_routing.turn_on_where_missing()
    if ON_GPU:
        look_at_models_here()
    outcome = found(name, dtypes[attempt], place)
    outcome["versions"] = f"vLLM {version('vllm')}, torch {target_families.torch.__version__}"
    outcome["tries_next"] = outcome["text"] == NOT_HERE and attempt + 1 < len(dtypes)
    if stands_in and "experts" in family_of(name).trait:
        outcome["stands_in"] = "experts are chosen in torch"
    (place / "found.json").write_text(json.dumps(outcome))
    sys.stdout.flush()
    # Without waiting for what the engine started.
    os._exit(0)


def look_at_models_here() -> None:
    """Let vLLM look at models in this process; another would import for longer than one runs."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()


def family_of(name: str) -> Family:
    """The row of the table of that name."""
    return next(family for family in target_families.FAMILIES if family.name == name)


if __name__ == "__main__":
    main()
