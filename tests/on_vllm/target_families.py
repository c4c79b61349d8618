"""What vLLM does with each family of targets, for ``tools/targets.py`` and a test.

Each family runs in a process of its own, so that one which ends it does not end the others. The
runner is the one that the environment asks for. As a program:

python -m tests.on_vllm.target_families FILE [FAMILY ...]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from dflash_plugin.errors import DFlashError
from tests.helpers.device import NOT_HERE, ON_GPU
from tests.helpers.families import FAMILIES, Family
from tests.helpers.greedy import greedy_text
from tests.on_vllm.family_checks import (
    BLOCK_SIZE,
    NEAR_TIE,
    NEW_TOKENS,
    Written,
    distance,
    drafted,
    prompts,
    served,
    write,
)
from tests.on_vllm.family_targets import dtypes, write_family
from tests.on_vllm.vllm_helpers import ON_V2

RIG = Path(__file__).with_name("v2_rig")
# What the runners want of the environment, by column of the table.
RUNNERS = {
    "vllm_v1": {"PYTHONPATH": os.getcwd()},
    "vllm_v2": {
        "PYTHONPATH": f"{RIG}:{os.getcwd()}",
        "VLLM_V2_ON_CPU": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    },
}
COLUMN = "vllm_v2" if ON_V2 else "vllm_v1"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
# vLLM refuses adaptive verification over back ends whose graphs hold passes of one length.
NO_GRAPHS = "Adaptive verification replays decode cudagraphs"
# Made once vLLM has run the target without this project's drafter.
SERVED = "served"
UNSERVED = (NOT_HERE, "vLLM does not have it")
OTHER_TEXT = "vLLM's text of this target alone is not Transformers'"
# Tokens of a pass, fewer than the checks ask for, so that prompts are read in other pieces.
PIECES = 200
NGRAMS = {"method": "ngram", "num_speculative_tokens": BLOCK_SIZE - 1, "prompt_lookup_max": 2}


def refusal(error: BaseException | None) -> DFlashError | None:
    """The refusal that led to an error."""
    while error is not None and not isinstance(error, DFlashError):
        error = error.__cause__ or error.__context__
    return error


def told(error: BaseException) -> str:
    """What an error of vLLM's says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What pydantic says around it.
    kept = [one for one in lines if not re.match(r"\d+ validation error|For further inf", one)]
    text = " ".join(kept).partition(" [type=")[0].removeprefix("Value error, ")
    return f"{type(error).__name__}: {text.partition('. ')[0].removesuffix('.')[:300]}"


def found(
    family: Family, place: Path, dtype: str, attention: list[str] | None = None
) -> dict[str, str]:
    """As ``outcome``, in this process; the back ends of the target's layers go to ``attention``."""
    target = write_family(family, place / "target")
    try:
        with served(family, place / "target", dtype, None) as engine:
            if attention is not None:
                attention += back_ends(engine)
            own = write(engine, NEW_TOKENS + BLOCK_SIZE)
    except Exception as error:  # Whatever vLLM raises is what is recorded.
        traceback.print_exc()
        failure = told(error)
        is_unknown = re.search("architectures .* are not supported|vLLM has no other way", failure)
        return {"text": UNSERVED[bool(is_unknown)], "message": failure}
    if dtype == "bfloat16":
        target = target.bfloat16().float()
    parts = ["equal" if dtype == "float32" else f"equal in {dtype}"]
    if not any(own.hits):
        parts.append("no prefix hits")
    message = {}
    of_core = [greedy_text(target, prompt, NEW_TOKENS) for prompt in prompts()]
    is_reference = max(map(distance, of_core, own.batched, own.logprobs)) < NEAR_TIE[dtype]
    if not is_reference:
        parts.append("drafts not compared")
        message = {"message": OTHER_TEXT}
        if ON_GPU and not keeps_text(family, place, dtype, own, max_num_batched_tokens=PIECES):
            return {
                "text": NOT_HERE,
                "message": f"{OTHER_TEXT}, and changes with the tokens of a pass",
            }
    # A GPU's attention does not depend on how many rows of a request a pass has.
    may_change = "latent" in family.trait and not ON_GPU
    if may_change and not keeps_text(family, place, dtype, own, speculative=NGRAMS):
        return {"text": NOT_HERE, "message": "vLLM's n-gram drafts change its text too"}
    (place / SERVED).touch()
    ways = [False]
    if ON_V2:
        ways.append(True)
    for adapts in ways:
        what = "adaptive: " if adapts else ""
        try:
            faults = drafted(family, place, target, dtype, own, adapts, is_reference)
        except Exception as error:
            traceback.print_exc()
            refused = refusal(error)
            if refused is None and not (adapts and NO_GRAPHS in str(error)):
                return {"text": "differs", "message": what + told(error)}
            if not adapts:
                return {"text": "refused", "message": str(refused)}
            parts.append("not adaptive")
            message = {"message": str(refused or told(error))}
        else:
            if faults:
                faults += [] if is_reference else [OTHER_TEXT]
                return {"text": "differs", "message": what + "; ".join(faults)}
    return {"text": ", ".join(parts), **message}


def back_ends(engine: Any) -> list[str]:
    """The attention back ends of an engine's layers."""
    layers = engine.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    attending = [layer for layer in layers if hasattr(layer, "get_attn_backend")]
    return sorted({layer.get_attn_backend().get_name() for layer in attending})


def keeps_text(family: Family, place: Path, dtype: str, own: Written, **changes: Any) -> bool:
    """Whether vLLM, without this project's drafter, writes the same with other settings."""
    with served(family, place / "target", dtype, None, **changes) as engine:
        texts = write(engine, NEW_TOKENS).texts
    cut = [text[:NEW_TOKENS] for text in own.texts]
    return max(map(distance, texts, cut, own.logprobs)) < NEAR_TIE[dtype]


def outcome(family: Family) -> dict[str, str]:
    """What vLLM does with a family.

    Returns:
        ``text`` and, unless all is equal, ``message``: as docs/targets.md explains them.
    """
    for dtype in dtypes(family):
        result = apart(family, dtype)
        if result["text"] not in UNSERVED:
            break
    return result


def apart(family: Family, dtype: str) -> dict[str, str]:
    """As ``found``, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receives, sends = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        process = context.Process(target=report, args=(family, place, dtype, sends))
        process.start()
        sends.close()
        try:
            result: dict[str, str] = receives.recv()
        except EOFError:
            text = "differs" if (place / SERVED).exists() else NOT_HERE
            result = {"text": text, "message": f"the process ended in {dtype}"}
        process.join()
        if kept := os.environ.get("FAMILY_LOGS"):
            shutil.copy(place / "log", Path(kept) / f"{family.name}-{dtype}.log")
    return result


def without_torchvision() -> None:
    """Let models import what they would read images with; on a CPU vLLM starts without it alone."""
    modules = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    for name in [*modules, "torchvision.transforms.v2.functional", "torchvision.io"]:
        sys.modules.setdefault(name, MagicMock())


def report(family: Family, place: Path, dtype: str, sends: Any) -> None:
    """Send what ``found`` finds."""
    log = os.open(place / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= ENVIRONMENT
    os.environ["DFLASH_PLUGIN_CACHE"] = str(place / "staged")
    without_torchvision()
    sends.send(found(family, place, dtype))
    sends.close()
    sys.stdout.flush()
    # Without waiting for what the engine started.
    os._exit(0)


def columns() -> dict[str, Any]:
    """Versions and the outcomes of all families, by column of the table."""
    versions = f"vLLM {version('vllm')}, torch {torch.__version__}"
    return {
        column: (versions, recorded({**os.environ, **ENVIRONMENT, **environment}))
        for column, environment in RUNNERS.items()
    }


def recorded(environment: dict[str, str]) -> dict[str, dict[str, str]]:
    """The outcomes by family, on a runner."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "tests.on_vllm.target_families", file.name]
        subprocess.run(command, env=environment, check=True)
        return json.load(file)


def main() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # Before the processes of the families begin, not in each.
    from vllm.v1.worker import cpu_worker  # noqa: F401

    families = {family.name: family for family in FAMILIES}
    outcomes = {}
    for name in sys.argv[2:] or families:
        outcomes[name] = outcome(families[name])
        print(name, outcomes[name], flush=True)
        Path(sys.argv[1]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
