"""Record what the Transformers engine does with each family of targets, for docs/targets.md.

python tools/targets.py && python tools/make_tables.py

The families are tiny random models on a CPU, in float32. Other engines' entries stay as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "targets.json"
sys.path.insert(0, str(ROOT))

from tests.helpers.families import FAMILIES, outcome  # noqa: E402


def main() -> None:
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    rows = {row["family"]: row for row in before.get("families", [])}
    record = {
        **before,
        "versions": {
            **before.get("versions", {}),
            "transformers": f"transformers {transformers.__version__}, torch {torch.__version__}",
        },
        "families": [
            {
                **rows.get(family.name, {}),
                "family": family.name,
                "model_type": family.kind,
                "trait": family.trait,
                "transformers": outcome(family),
            }
            for family in FAMILIES
        ],
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
