"""What the files alone tell, as ``inspect`` does."""

from __future__ import annotations

from pathlib import Path

from dflash_plugin.checkpoints.inspection import inspect_checkpoint
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.drafter.config import Dialect
from dflash_plugin.errors import DFlashError


def check_configuration(directory: Path, target: Path, dialect: Dialect | None) -> Check:
    """What ``inspect`` finds; an error keeps the drafter from running."""
    looked_at = "config.json and tensors of the drafter, against the target's configuration"

    def fault(name: str, finding: str, fix: str) -> Check:
        return Check(
            name=name,
            status="fault",
            looked_at=looked_at,
            finding=finding,
            fix=fix,
            certainty=Certainty.SURE,
        )

    try:
        report = inspect_checkpoint(directory, target, dialect=dialect)
    except DFlashError as error:
        if dialect is not None and _reads(directory):
            return fault(
                "dialect",
                f"the checkpoint does not read as {dialect}, and does as it is detected: {error}",
                "leave --dialect (the plugin's option dialect) out",
            )
        fix = (
            "mend what the message names; of two values keep either and run doctor again, which "
            "tries others against it"
        )
        return fault("configuration", str(error), fix)
    errors = [f for f in report.findings if f.level == "error"]
    if errors:
        text = "; ".join(f"{f.subject}: {f.message}" for f in errors)
        fix = f"use the drafter that was made for this target, or correct {directory}/config.json"
        return fault("configuration", text, fix)
    warnings = [f"{f.subject}: {f.message}" for f in report.findings if f.level == "warning"]
    return Check(
        name="configuration",
        status="note" if warnings else "ok",
        looked_at=looked_at,
        finding="; ".join(warnings) or f"a {report.config.dialect} drafter that fits its target",
        evidence={
            "dialect": report.config.dialect,
            "parameters": report.parameters,
            "notes": [f.message for f in report.findings if f.level == "note"],
        },
    )


def _reads(directory: Path) -> bool:
    try:
        inspect_checkpoint(directory)
    except DFlashError:
        return False
    return True
