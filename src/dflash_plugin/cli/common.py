"""What the commands share: options, consoles, error messages, loading."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dflash_plugin.drafter.config import Dialect, DraftWeights
from dflash_plugin.errors import DFlashError

Dtype = Literal["float32", "bfloat16", "float16"]
Thinking = Literal["on", "off"]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the first GPU by default.")]
DraftWeightsOption = Annotated[
    DraftWeights,
    typer.Option(help="fp8 rounds the drafter's linears and its head's copy to FP8."),
]
DialectOption = Annotated[
    Dialect | None, typer.Option(help="Dialect to read, where the file does not say enough.")
]


class OutputConsole(Console):
    """A console that wraps lines at a terminal's width only, so that piped paths stay whole."""

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        """Columns and rows; without a terminal, more columns than any line has."""
        if self.is_terminal or "COLUMNS" in os.environ:
            return super().size
        return ConsoleDimensions(10_000, 100)


console = OutputConsole()
errors = OutputConsole(stderr=True)


def reports_errors(
    command: Callable[..., None], flags: Mapping[str, str] | None = None
) -> Callable[..., None]:
    """Print a ``DFlashError`` as one message and exit with 1.

    Args:
        command: of the command line.
        flags: what the message calls a setting, by its name in Python, where that is not the
            parameter's name with hyphens.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DFlashError as error:
            message = in_flags(str(error), names)
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{str(error.filename)!r}: {error.strerror}: check the path and its rights"
        else:
            return
        errors.print(f"error: {message}", style="red", markup=False, highlight=False)
        raise typer.Exit(1)

    names = {name: f"--{name.replace('_', '-')}" for name in signature(command).parameters}
    names.update(flags or {})
    return wrapped


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message with flags in the place of Python names: those with an underscore, and the first.

    Args:
        message: of an error.
        flags: by Python name.
    """
    for name, flag in flags.items():
        # Not in quotes or paths.
        found = rf"(?<![\w'\"/.-]){name}(?![\w'\"/.])" if "_" in name else rf"^{name}(?= is |=)"
        message = re.sub(found, flag, message)
    return message


def print_json(value: Any) -> None:
    """Write a value to standard output as JSON."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def quiet() -> None:
    """Silence Transformers' progress bars and notes."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*capture_outputs.*")


def check_output(directory: Path) -> None:
    """Find out before the work whether files can be written into a directory, there or not yet.

    Raises:
        DFlashError: they cannot.
    """
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise DFlashError(f"{str(there)!r} is a file: give a directory to write into")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DFlashError(f"nothing can be written into {str(there)!r}: give another directory")


@contextmanager
def stage_bars() -> Iterator[Callable[..., None]]:
    """A bar for each stage of a long command; plain lines where there is no terminal.

    Yields:
        A function of a stage's name, what is done and of how much; with ``note`` to show beside
        it, and ``line`` False where the plain line is left out.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=errors,
        disable=not errors.is_terminal,
    ) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, of: int, note: str = "", line: bool = True) -> None:
            if what not in tasks:
                # What an earlier run did says nothing about how fast this one is.
                tasks[what] = progress.add_task(what, total=of, completed=done, note=note)
            progress.update(tasks[what], completed=done, total=of, note=note)
            if not errors.is_terminal and line:
                errors.print(f"{what} {done}/{of} {note}".rstrip(), markup=False, highlight=False)

        yield show


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, list[int]], None]]:
    """A status line that counts tokens as they come."""
    written = 0
    with errors.status(what) as status:

        def count(_: int, tokens: list[int]) -> None:
            nonlocal written
            written += len(tokens)
            status.update(f"{what}, {written:,} tokens")

        yield count


def resolve_pair(target: str, drafter: Path | None) -> tuple[Path, Path]:
    """Directories of a target and its drafter; a target that is missing is named first.

    Raises:
        DFlashError: one of them is missing.
    """
    from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model

    if drafter is not None and not drafter.is_dir():
        raise DFlashError(f"--drafter is {str(drafter)!r}, which is not a directory")
    model = resolve_model(target)
    return model, resolve_drafter(drafter, target)


def load(
    target: Path, drafter: Path, dtype: Dtype | None, device: str | None, weights: DraftWeights
) -> Any:
    """Target, drafter and tokenizer, behind a status line.

    Raises:
        DFlashError: one of them does not load.
    """
    import torch

    from dflash_plugin.transformers import load_drafter, load_target

    with errors.status("loading"):
        model, tokenizer = load_target(target, getattr(torch, dtype) if dtype else None, device)
        return model, load_drafter(drafter, model, weights=weights), tokenizer
