"""Record what an engine does with each family of targets, for docs/targets.md.

python tools/targets.py && python tools/make_tables.py
.venv-vllm/bin/python tools/targets.py --engine vllm
.venv-sglang/bin/python tools/targets.py --engine sglang

The families are tiny random models on a CPU, in float32 where the engine can. Each engine's entries
are made in its own environment; those of the others stay as they are.

With ``--device``, the families run that a CPU does not show whole, on one engine or both, several
at a time, into a file of their own, which the table reads beside the first. On a GPU:

python tools/targets.py --device cuda --engine vllm,sglang \\
    --where vllm=VLLM --where sglang=SGLANG --output benchmarks/results/targets-h200.json

where VLLM and SGLANG are interpreters, or directories of packages, that have the engine. What is in
the file already stays, but for what runs again.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "targets.json"
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.helpers.families import FAMILIES, outcome  # noqa: E402
from tests.helpers.gpu_families import SHOWN  # noqa: E402
from tools.family_runs import Runs  # noqa: E402

ENGINES = ("transformers", "vllm", "sglang")


def of_transformers() -> dict[str, Any]:
    """The Transformers engine's version and outcomes, by column of the table."""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {"transformers": (versions, {family.name: outcome(family) for family in FAMILIES})}


def record_all(engine: str) -> None:
    """Write the outcomes of all families on a CPU into the record."""
    if engine == "transformers":
        columns = of_transformers()
    else:
        columns = importlib.import_module(f"tests.on_{engine}.target_families").columns()
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    rows = {row["family"]: row for row in before.get("families", [])}
    record = {
        **before,
        "versions": {
            **before.get("versions", {}),
            **{column: versions for column, (versions, _) in columns.items()},
        },
        "families": [
            {
                **rows.get(family.name, {}),
                "family": family.name,
                "model_type": family.kind,
                "trait": family.trait,
                **{column: found[family.name] for column, (_, found) in columns.items()},
            }
            for family in FAMILIES
        ],
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def record_on(device: str, engines: list[str], families: list[str], runs: Runs, file: Path) -> None:
    """Run families on a device and write each outcome into a file as it comes.

    Args:
        device: "cuda" or "cpu".
        engines: "vllm" or "sglang" or both.
        families: by the names of the table.
        runs: how.
        file: of the record.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    about = {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "tools/targets.py", *sys.argv[1:]]),
    }

    def keep(engine: str, family: str, found: dict[str, Any]) -> None:
        print(f"{engine}: {family}: {found}", flush=True)
        versions = found.pop("versions", None)
        update(file, {"about": about, "engine": engine, "versions": versions}, family, found)

    runs.all(engines, families, keep)


def update(file: Path, run: dict[str, Any], family: str, found: dict[str, Any]) -> None:
    """Write one outcome into a record; another process may write others at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        record = json.loads(file.read_text() or '{"engines": {}, "families": []}')
        engine = run["engine"]
        versions = run["versions"] or record["engines"].get(engine, {}).get("versions")
        record["engines"][engine] = {**run["about"], "versions": versions}
        rows = {row["family"]: row for row in record["families"]}
        rows[family] = {**rows.get(family, {"family": family}), engine: found}
        order = [one.name for one in FAMILIES if one.name in rows]
        record["families"] = [rows[name] for name in order]
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--engine", default="transformers", help="vllm and sglang may be joined: vllm,sglang"
    )
    device = parser.add_argument_group("on a device, into a file of its own")
    device.add_argument("--device", choices=["cuda", "cpu"])
    device.add_argument("--output", type=Path, help="the file; what it holds already stays")
    device.add_argument("--family", action="append", help="instead of all; may be repeated")
    device.add_argument("--jobs", type=int, default=6, help="families at the same time (6)")
    device.add_argument("--time-limit", type=float, default=200, help="seconds of a family (200)")
    device.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="an engine's interpreter, or the directory of packages that it is in",
    )
    device.add_argument("--logs", type=Path, help="a directory for what the processes print")
    asked = parser.parse_args()
    engines = asked.engine.split(",")
    if not set(engines) <= set(ENGINES):
        parser.error(f"--engine is one of {', '.join(ENGINES)}, or vllm,sglang")
    if asked.device is None:
        if len(engines) > 1:
            parser.error("without --device each engine runs in its own environment: give one")
        record_all(engines[0])
        return
    families = asked.family or list(SHOWN)
    unknown = set(families) - {family.name for family in FAMILIES}
    if asked.output is None or "transformers" in engines or unknown:
        parser.error("--device needs --output, vllm or sglang, and families of docs/targets.md")
    where = {engine: Path(path) for engine, _, path in (one.partition("=") for one in asked.where)}
    runs = Runs(asked.device, asked.jobs, asked.time_limit, where, asked.logs)
    record_on(asked.device, engines, families, runs, asked.output)


if __name__ == "__main__":
    main()
