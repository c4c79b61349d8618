"""A finished run as a directory that can be uploaded to a hub as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dflash_plugin.checkpoints.files import read_json
from dflash_plugin.checkpoints.inspection import Report, inspect_checkpoint
from dflash_plugin.checkpoints.io import CONFIG, WEIGHTS
from dflash_plugin.checkpoints.reference_drafts import FILE_NAME
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.card import CURVE, learning_curve, model_card

FACTS = "training.json"
CARD = "README.md"
PUBLISHED = (CONFIG, WEIGHTS, FILE_NAME, FACTS, CARD, CURVE)


def publish(
    run: Path,
    output: Path,
    *,
    license: str,
    base_model: str | None = None,
    name: str | None = None,
    evaluation: Path | None = None,
    target: Path | None = None,
) -> Report:
    """Put weights, known answers, facts, curve and card of a run into a directory.

    Args:
        run: ``--output`` of a training that ended.
        output: is made; files of the same names are replaced.
        license, base_model, name: for the card, see ``model_card``; ``name`` is the directory's
            own where None.
        evaluation: what ``dflash-plugin eval --json`` printed about this drafter.
        target: directory to hold the drafter against.

    Returns:
        What ``inspect`` says of the directory.

    Raises:
        DFlashError: the run has not ended, a file is malformed, or the drafter does not load or
            does not fit its target.
    """
    facts_file = next((f for f in (run / "work" / FACTS, run / FACTS) if f.is_file()), None)
    missing = [name for name in (CONFIG, WEIGHTS, FILE_NAME) if not (run / name).is_file()]
    if facts_file is None or missing:
        raise DFlashError(
            f"{str(run)!r} lacks {missing[0] if missing else FACTS}, so it is no finished run: "
            "give the --output of `dflash-plugin train`, once it has ended"
        )
    if output.resolve() == run.resolve():
        raise DFlashError(f"{str(output)!r} is the run itself: give another directory")
    facts = read_json(facts_file)
    measured = None if evaluation is None else _evaluation(evaluation)
    output.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG, WEIGHTS, FILE_NAME):
        shutil.copyfile(run / file, output / file)
    shutil.copyfile(facts_file, output / FACTS)
    if facts.get("history"):
        (output / CURVE).write_text(learning_curve(facts["history"]), encoding="utf-8")
    report = inspect_checkpoint(output, target)
    if not report.fits:
        first = next(finding for finding in report.findings if finding.level == "error")
        raise DFlashError(f"{first.subject}: {first.message}")
    card = model_card(
        report.config,
        report.parameters,
        facts,
        name=name or output.name,
        base_model=base_model,
        license=license,
        evaluation=measured,
    )
    (output / CARD).write_text(card, encoding="utf-8")
    return report


def _evaluation(path: Path) -> dict[str, Any]:
    found = read_json(path)
    needed = {"set_name", "prompts", "tau", "acceptance"}
    sets = found.get("sets")
    whole = isinstance(sets, list) and sets and all(needed <= set(one) for one in sets)
    if not whole or not {"device", "dtype", "date"} <= set(found):
        raise DFlashError(
            f"evaluation is {str(path)!r}, which holds no τ by set: give what `dflash-plugin eval "
            "--json` printed"
        )
    return found
