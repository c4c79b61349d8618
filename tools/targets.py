"""Record what an engine does with each family of targets, for docs/targets.md.

python tools/targets.py && python tools/make_tables.py
.venv-vllm/bin/python tools/targets.py --engine vllm
.venv-sglang/bin/python tools/targets.py --engine sglang

The families are tiny random models on a CPU, in float32 where the engine can. Each engine's entries
are made in its own environment; those of the others stay as they are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "targets.json"
sys.path.insert(0, str(ROOT))

from tests.helpers.families import FAMILIES, outcome  # noqa: E402


def of_transformers() -> dict[str, Any]:
    """The Transformers engine's version and outcomes, by column of the table."""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {"transformers": (versions, {family.name: outcome(family) for family in FAMILIES})}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--engine", choices=["transformers", "vllm", "sglang"], default="transformers"
    )
    engine = parser.parse_args().engine
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


if __name__ == "__main__":
    main()
