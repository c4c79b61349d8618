"""Models that are fetched by name: the ones that the examples and tests run on."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dflash_plugin.checkpoints.gguf_convert import convert_gguf
from dflash_plugin.checkpoints.gguf_download import Progress, download, join
from dflash_plugin.checkpoints.gguf_models import MODELS
from dflash_plugin.errors import DFlashError, reason

CACHE = "DFLASH_PLUGIN_CACHE"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
SHIPPED_DRAFTERS = {"smollm2": "smollm2-135m-dflash", "smollm2-135m": "smollm2-135m-dflash"}
"""Directories of ``shipped/``, by the name of the target that they were trained for."""


def cache_directory() -> Path:
    """Where fetched models live: ``DFLASH_PLUGIN_CACHE``, or ``~/.cache/dflash-plugin``.

    Raises:
        DFlashError: the user has no home.
    """
    given = os.environ.get(CACHE, "").strip() or "~/.cache/dflash-plugin"
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError as error:
        raise DFlashError(
            f"the cache {given!r} cannot be found ({reason(error)}): set {CACHE} to a folder that "
            "can be written"
        ) from error


def fetch_model(name: str, directory: Path | None = None, progress: Progress | None = None) -> Path:
    """Make a model directory that Transformers, vLLM and SGLang load.

    ``smollm2`` is SmolLM2-135M-Instruct, dequantized from Q4_1 to float32 (538 MB);
    ``qwen2.5-coder-1.5b`` is Qwen2.5-Coder-1.5B-Instruct, dequantized from Q4_K_M to bfloat16
    (3.6 GB). Both are Apache-2.0. A directory that is complete is left alone. What an interrupted
    fetch has downloaded stays under ``cache_directory()`` until the model is made.

    Args:
        name: a key of ``MODELS``.
        directory: where to put it; under ``cache_directory()`` when None.
        progress: called with a text, slices done and their number; lines on standard error when
            None.

    Returns:
        The directory.

    Raises:
        DFlashError: the name is unknown, the directory holds something else, a download fails,
            a checksum is wrong, or Transformers cannot read it.
    """
    model = MODELS.get(name)
    if model is None:
        raise DFlashError(f"no model named {name!r} can be fetched: choose from {sorted(MODELS)}")
    target = directory or cache_directory() / "models" / model.directory
    if _is_complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DFlashError(
            f"{str(target)!r} exists and is not a complete {name} model: remove it or choose "
            "another directory"
        )
    kept = cache_directory() / "downloads" / model.directory
    with _scratch_beside(target) as scratch:
        try:
            gguf, made = scratch / f"{model.title}.gguf", scratch / "model"
            join(download(model, kept, progress or _print_progress), gguf)
            dtype = str(model.dtype).removeprefix("torch.")
            print(f"converting {model.quantization} to {dtype}", file=sys.stderr)
            convert_gguf(gguf, model, made)
            made.rename(target)
        except OSError:
            # Another process may have fetched the same model meanwhile, and removed its slices.
            if not _is_complete(target):
                raise
    shutil.rmtree(kept, ignore_errors=True)
    return target


def _print_progress(what: str, done: int, of: int) -> None:
    print(f"{what} {done}/{of}", file=sys.stderr)


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """A temporary directory on the file system of ``target``, which a rename does not leave."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-")
    except OSError as error:
        raise DFlashError(
            f"nothing can be written in {str(target.parent)!r} ({reason(error)}): choose another "
            "directory, or set DFLASH_PLUGIN_CACHE"
        ) from error
    with scratch as directory:
        yield Path(directory)


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in _FILES)


def resolve_model(name_or_path: str | Path) -> Path:
    """A model directory: the path itself, or the model of that name, fetched when absent.

    Raises:
        DFlashError: it is neither, or what ``fetch_model`` raises.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if name in MODELS:
        return fetch_model(name)
    if looks_like_path(name):
        state = "is not a directory" if path.exists() else "is not there"
        raise DFlashError(
            f"the model {name!r} {state}: give the path of a directory with config.json and "
            "*.safetensors"
        )
    raise DFlashError(
        f"{name!r} is neither a model directory nor one of {sorted(MODELS)}: give the path of a "
        "directory with config.json and *.safetensors"
    )


def looks_like_path(name: str) -> bool:
    """Whether a value that names no directory was meant as one, so that no hub is asked for it.

    ``organization/model`` is a hub's name unless there is a directory ``organization`` here.
    """
    if name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/"):
        return True
    return name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())


def resolve_drafter(directory: Path | None, target: str) -> Path:
    """The given drafter, or the one that the package holds for a target fetched by name.

    Raises:
        DFlashError: none was given and the package holds none.
    """
    if directory is not None:
        return directory
    if target not in SHIPPED_DRAFTERS:
        raise DFlashError(
            f"no drafter is shipped for {target!r}: give --drafter DIR (shipped for: "
            f"{', '.join(SHIPPED_DRAFTERS)})"
        )
    return Path(__file__).parents[1] / "shipped" / SHIPPED_DRAFTERS[target]
