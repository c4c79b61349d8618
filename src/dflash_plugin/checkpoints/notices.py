"""By which rule a drafter is read where it leaves one open: told once a program."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

logger = logging.getLogger("dflash_plugin")

_told: set[tuple[Path, str]] = set()
_in_a_report: ContextVar[bool] = ContextVar("in a report", default=False)


def warn_once(directory: Path, message: str) -> None:
    """Log a warning about a drafter, unless the program has told it already."""
    if not _in_a_report.get() and (directory.resolve(), message) not in _told:
        logger.warning("%s: %s", directory.resolve(), message)
    mark_told(directory, message)


def mark_told(directory: Path, message: str) -> None:
    """Note that the program tells a warning in another way than its log, such as a report."""
    _told.add((directory.resolve(), message))


@contextmanager
def reported() -> Iterator[None]:
    """Log no warning in the block, because the program tells what it found in a report."""
    token = _in_a_report.set(True)
    try:
        yield
    finally:
        _in_a_report.reset(token)
