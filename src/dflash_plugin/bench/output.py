"""Checks of an output file before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dflash_plugin.errors import DFlashError


def check_output_file(output: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output that would replace something, or that cannot be written.

    Args:
        output: the file to write.
        inputs: files that are read, which nothing replaces.
        overwrite: whether another file may be replaced.

    Raises:
        DFlashError: names the file and says what to do.
    """
    if any(path.exists() and output.exists() and path.samefile(output) for path in inputs):
        raise DFlashError(f"{str(output)!r} is an input as well: give another --output")
    if not output.parent.is_dir():
        raise DFlashError(f"{str(output.parent)!r} is not a directory: make it, or change --output")
    if output.is_dir():
        raise DFlashError(f"{str(output)!r} is a directory: give the name of a file as --output")
    if output.exists() and not overwrite:
        raise DFlashError(
            f"{str(output)!r} is already there: give another --output, or --overwrite"
        )
    part = partial_path(output)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise DFlashError(
            f"{str(output)!r} cannot be written ({error}): give another --output"
        ) from error


def partial_path(output: Path) -> Path:
    """The file beside an output that takes its place once it is whole."""
    return output.with_name(output.name + ".part")
