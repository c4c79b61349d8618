"""The command that trains a drafter."""

from __future__ import annotations

import inspect
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dflash_plugin.cli.common import (
    Device,
    Json,
    check_output,
    errors,
    print_json,
    quiet,
    reports_errors,
    stage_bars,
)
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.config import (
    PARTS,
    SHAPE,
    DataConfig,
    TrainConfig,
    flag_names,
    load_prefixes,
)

# A checkpoint to start from decides these, so that whether they are given matters.
_UNSET = {*SHAPE, *PARTS, "selector_weight"}


def train(
    target: Annotated[str, typer.Option(help="Model directory, or smollm2.")],
    output: Annotated[
        Path, typer.Option(help="Where the drafter goes; work files in OUTPUT/work.")
    ],
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another drafter in OUTPUT.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Refuse to start anew where there is no snapshot.")
    ] = False,
    stop_at: Annotated[
        int | None,
        typer.Option(min=1, help="Step after which to leave a snapshot and stop; not exported."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Time from the command's start after which to leave a snapshot and stop; not "
            "exported.",
        ),
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train a drafter on what the target itself writes. Goes on where it was interrupted."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    config = _validated(TrainConfig, settings)
    data = _validated(DataConfig, settings)
    quiet()
    _check_output(output, overwrite, resume)
    from dflash_plugin.checkpoints.hub import resolve_model
    from dflash_plugin.train import pipeline
    from dflash_plugin.train.export import export_drafter, save_facts

    directory = resolve_model(target)
    with pipeline.distributed(), _training_progress(config.steps) as (status, report):
        trainer, facts = pipeline.train(
            directory, output, config, data, device, status, report, stop_at, deadline
        )
        if trainer.rank == 0 and trainer.step < config.steps:
            errors.print(
                f"stopped after step {trainer.step} of {config.steps}, snapshot in "
                f"{output / 'work'}: give the same command with --resume to go on",
                markup=False,
                soft_wrap=True,
            )
        elif trainer.rank == 0:
            facts["command"] = _command(facts)
            save_facts(output / "work" / "training.json", facts)
            export_drafter(trainer.drafter, directory, output, facts, device)
            if as_json:
                print_json({"output": str(output), **facts})
            else:
                errors.print(f"drafter written to {output}", markup=False, soft_wrap=True)


def _with_options_of_the_settings(command: Any) -> Any:
    """Put an option of each field of the two settings classes in the place of ``**settings``."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    made = [
        _option(name, flag, field, panel)
        for model, panel in ((TrainConfig, "Drafter and training"), (DataConfig, "Data"))
        for name, flag, field in model.flags()
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *made)]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _option(name: str, flag: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    kind: Any = field.annotation
    default, text = field.default, field.description or ""
    if name in _UNSET and default is not None:
        kind, default, text = kind | None, None, f"{text}; {default} by default."
    if kind is bool and flag != "--dflash2":
        flag = f"{flag}/--no-{flag[2:]}"
    if isinstance(default, tuple) or tuple in map(_origin, get_args(kind)):
        default = None
        kind = {"prompts": list[Path] | None, "openings": Path | None}.get(name, str | None)
    option = typer.Option(flag, help=text, rich_help_panel=panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _origin(kind: Any) -> Any:
    return getattr(kind, "__origin__", None)


def _validated(model: Any, settings: dict[str, Any]) -> Any:
    """The settings of a class out of the options, or one line about the first wrong one."""
    given = {
        name: value
        for name, value in settings.items()
        if name in model.model_fields and value is not None
    }
    if "target_layer_ids" in given:
        given["target_layer_ids"] = _layer_ids(given["target_layer_ids"])
    if "mix" in given:
        given["mix"] = given["mix"].split(",")
    if "openings" in given:
        given["openings"] = load_prefixes(given["openings"])
    try:
        return model(**given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = flag_names()[str(first["loc"][0])]
        raise DFlashError(f"{flag} is {first['input']!r}: {first['msg']}") from None


def _layer_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DFlashError(
            f"--target-layers is {text!r}: write layer ids with commas between, like 1,9,17,25"
        ) from None


def _check_output(output: Path, overwrite: bool, resume: bool) -> None:
    """Find out before the work whether the drafter can be written, and what it would replace."""
    from dflash_plugin.train.snapshot import FILE

    check_output(output / "work")
    snapshot = output / "work" / FILE
    resumes = snapshot.is_file()
    if resume and not resumes:
        raise DFlashError(
            f"--resume was given, but {str(snapshot)!r} is not there: give the --output of the "
            "run to go on with, or leave --resume out"
        )
    replaced = output / "config.json"
    if replaced.exists() and not resumes and not overwrite:
        raise DFlashError(
            f"{str(output)!r} holds a drafter that this run did not make: give another --output, "
            "or --overwrite"
        )


def _command(facts: dict[str, Any]) -> str:
    """The command line as a user would type it again."""
    processes = facts["processes"]
    program = (
        "dflash-plugin"
        if processes == 1
        else f"torchrun --nproc-per-node {processes} -m dflash_plugin"
    )
    return f"{program} {shlex.join(sys.argv[1:])}"


@contextmanager
def _training_progress(steps: int) -> Iterator[tuple[Any, Any]]:
    """What shows data and steps, and what takes the records of steps."""
    first: tuple[int, float] | None = None
    with stage_bars() as show:

        def report(record: dict[str, float]) -> None:
            nonlocal first
            step = int(record["step"])
            # What earlier starts of the run took says nothing about this one.
            first = (step, record["seconds"]) if first is None else first
            note = f"loss {record['loss']:.3f} τ {record['tau']:.2f}"
            if "held_out_tau" in record:
                note += f" held-out τ {record['held_out_tau']:.2f}"
            if not errors.is_terminal:
                seconds = (record["seconds"] - first[1]) / max(1, step - first[0])
                left = (steps - step) * seconds
                note += f" {record['seconds']:.0f} s, {left:.0f} s left"
            line = "held_out_tau" in record or step % 100 == 0
            show("training", step, steps, note, line)

        yield show, report


train = reports_errors(_with_options_of_the_settings(train), flag_names())
