"""Commands for checkpoints: fetch, inspect, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dflash_plugin.cli.common import (
    DialectOption,
    Json,
    check_output,
    console,
    errors,
    print_json,
    quiet,
    reports_errors,
    stage_bars,
)
from dflash_plugin.drafter.config import Dialect
from dflash_plugin.errors import DFlashError


@reports_errors
def fetch(
    name: Annotated[str, typer.Argument(help="Model to fetch: smollm2 or qwen2.5-coder-1.5b.")],
    output: Annotated[Path | None, typer.Option(help="Directory; the cache by default.")] = None,
    as_json: Json = False,
) -> None:
    """Download a target and make its model directory. Goes on where it was interrupted."""
    quiet()
    from dflash_plugin.checkpoints.hub import fetch_model

    with stage_bars() as progress:
        directory = fetch_model(name, output, progress)
    if as_json:
        print_json({"name": name, "directory": str(directory)})
    else:
        console.print(str(directory), markup=False, highlight=False, soft_wrap=True)


@reports_errors
def inspect(
    directory: Annotated[Path, typer.Argument(help="Drafter checkpoint.")],
    target: Annotated[str | None, typer.Option(help="Its target, or smollm2.")] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="What the engine will be told.")
    ] = None,
    dialect: DialectOption = None,
    replay: Annotated[
        bool, typer.Option(help="Run the known answers on the target in float32.")
    ] = False,
    record: Annotated[
        bool, typer.Option(help="Write what the float32 core drafts beside a checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let --record replace known answers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what a checkpoint is and every mismatch with its target; exit 1 on an error."""
    quiet()
    from dflash_plugin.checkpoints.hub import resolve_model
    from dflash_plugin.checkpoints.inspection import inspect_checkpoint

    model = resolve_model(target) if target else None
    name: Dialect | None = dialect
    report = inspect_checkpoint(directory, model, num_speculative_tokens, name)
    if record:
        _record(directory, model, report.fits, name, overwrite)
    if replay:
        _replay(directory, model, report.fits, name)
    if as_json:
        print_json({**report.model_dump(mode="json"), "fits": report.fits, "replayed": replay})
    else:
        _print_report(report, replay)
    if not report.fits:
        raise typer.Exit(1)


def _record(
    directory: Path, target: Path | None, fits: bool, dialect: Dialect | None, overwrite: bool
) -> None:
    import torch

    from dflash_plugin.checkpoints.reference_drafts import FILE_NAME
    from dflash_plugin.train.export import record_known_answers
    from dflash_plugin.transformers import load_target

    if target is None or not fits:
        raise DFlashError("--record needs --target and a report without errors")
    if (directory / FILE_NAME).exists() and not overwrite:
        raise DFlashError(
            f"{str(directory / FILE_NAME)!r} is already there: check it with --replay, or replace "
            "it with --overwrite"
        )
    record_known_answers(directory, *load_target(target, torch.float32), dialect=dialect)


def _replay(directory: Path, target: Path | None, fits: bool, dialect: Dialect | None) -> None:
    import torch

    from dflash_plugin.checkpoints.reference_drafts import load_record
    from dflash_plugin.checkpoints.reference_drafts import replay as replay_record
    from dflash_plugin.transformers import load_drafter, load_target

    record = load_record(directory)
    if target is None or record is None or not fits:
        raise DFlashError(
            "--replay needs --target, a known_answer.json beside the drafter, and a report without "
            "errors"
        )
    model, _ = load_target(target, torch.float32)
    replay_record(load_drafter(directory, model, dialect=dialect), model, record)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _print_report(report: Any, replayed: bool) -> None:
    config = report.config
    console.print(report.directory, markup=False, highlight=False, soft_wrap=True)
    table = Table("field", "value")
    for name, value in config.model_dump(exclude={"layers", "rope"}).items():
        if value is not None:
            table.add_row(name, _listed(value) if isinstance(value, dict) else str(value))
    for index, layer in enumerate(config.layers):
        window = f"window {layer.sliding_window}" if layer.sliding_window else "full"
        table.add_row(f"layer {index}", f"{window}, {'causal' if layer.causal else 'not causal'}")
    table.add_row("rope", _listed(config.rope.model_dump()))
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row("speculative tokens", str(report.num_draft_tokens))
    answers = f"{report.known_answers}" + (" (replayed: all equal)" if replayed else "")
    table.add_row("known answers", answers)
    console.print(table)
    styles = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in report.findings:
        console.print(
            f"{finding.level}: {finding.subject}: {finding.message}",
            style=styles[finding.level],
            markup=False,
        )
    if not report.findings:
        console.print("nothing to remark")


@reports_errors
def convert(
    source: Annotated[Path, typer.Argument(help="Drafter checkpoint of any dialect.")],
    output: Annotated[Path, typer.Argument(help="New directory.")],
    to: Annotated[Dialect, typer.Option(help="Dialect to write.")],
    dialect: DialectOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint in OUTPUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of one dialect as another."""
    quiet()
    from dflash_plugin.checkpoints.convert import COMPANIONS
    from dflash_plugin.checkpoints.convert import convert as convert_checkpoint
    from dflash_plugin.checkpoints.io import CONFIG, WEIGHTS

    check_output(output)
    replaced = [name for name in (CONFIG, WEIGHTS, *COMPANIONS) if (output / name).exists()]
    if replaced and not overwrite:
        raise DFlashError(
            f"{str(output / replaced[0])!r} is already there: give another directory, or "
            "--overwrite"
        )
    config = convert_checkpoint(source, output, to, dialect, overwrite)
    if as_json:
        print_json({"output": str(output), "config": config.model_dump(mode="json")})
    else:
        errors.print(f"{to} checkpoint written to {output}", markup=False, soft_wrap=True)
