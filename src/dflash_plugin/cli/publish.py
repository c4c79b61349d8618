"""The command that makes a hub repository of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dflash_plugin.cli.common import (
    Json,
    check_output,
    errors,
    print_json,
    quiet,
    reports_errors,
)
from dflash_plugin.errors import DFlashError


@reports_errors
def publish(
    run: Annotated[Path, typer.Argument(help="OUTPUT of `dflash-plugin train`.")],
    to: Annotated[Path, typer.Option(help="New directory, to be uploaded by you.")],
    license: Annotated[str, typer.Option(help="Of the drafter, for the card, like apache-2.0.")],
    base_model: Annotated[
        str | None, typer.Option(help="The target's name on the hub, for the card.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The drafter's name on the hub; TO's name by default.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What `dflash-plugin eval --json` printed.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Hold the drafter against it: model directory, or smollm2.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what was published in TO.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a directory for a model hub: weights, known answers, card. Uploads nothing."""
    quiet()
    from dflash_plugin.checkpoints.hub import resolve_model
    from dflash_plugin.train.publish import PUBLISHED
    from dflash_plugin.train.publish import publish as publish_run

    check_output(to)
    there = [file for file in PUBLISHED if (to / file).exists()]
    if there and not overwrite:
        raise DFlashError(
            f"{str(to / there[0])!r} is already there: give another directory, or --overwrite"
        )
    report = publish_run(
        run,
        to,
        license=license,
        base_model=base_model,
        name=name,
        evaluation=evaluation,
        target=None if target is None else resolve_model(target),
    )
    if as_json:
        print_json({"output": str(to), **report.model_dump(mode="json")})
    else:
        errors.print(f"ready to upload: {to}", markup=False, soft_wrap=True)
