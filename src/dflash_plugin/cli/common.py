"""What the commands share: options, consoles, error messages, loading."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dflash_plugin.drafter.config import Dialect, DraftWeights
from dflash_plugin.errors import DFlashError

console = Console()
errors = Console(stderr=True)

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


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print a ``DFlashError`` as one message and exit with 1."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DFlashError as error:
            errors.print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from None

    return wrapped


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


def load(
    target: Path, drafter: Path, dtype: Dtype | None, device: str | None, weights: DraftWeights
) -> Any:
    """Target, drafter and tokenizer, behind a status line."""
    import torch

    from dflash_plugin.transformers import load_drafter, load_target

    with errors.status("loading"):
        model, tokenizer = load_target(target, getattr(torch, dtype) if dtype else None, device)
        return model, load_drafter(drafter, model, weights=weights), tokenizer
