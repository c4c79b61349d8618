"""Finds a drafter's checkpoint: a directory, or a repository fetched as the engine fetches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dflash_plugin.checkpoints.files import MASK_EMBEDDING, read_json
from dflash_plugin.checkpoints.io import CONFIG
from dflash_plugin.errors import DFlashError, reason

# A pickled mask embedding is not read, but must not go unseen.
PATTERNS = ("*.json", "*.safetensors", f"{MASK_EMBEDDING}.*")


class Source(NamedTuple):
    """How an engine's settings say a repository is fetched.

    ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN`` count beside them.

    Attributes:
        revision: branch, tag or commit; None for the hub's default.
        download_dir: where files go; None for the hub's own cache.
        token: of the Hugging Face hub; True for the one of its login, None for its default.
        modelscope: fetch from ModelScope instead.
    """

    revision: str | None = None
    download_dir: str | None = None
    token: bool | str | None = None
    modelscope: bool = False


def resolve(model: str, source: Source) -> Path:
    """The drafter's directory, fetched if it is not one here; "~" is the home.

    Raises:
        DFlashError: there is no such directory, the repository cannot be fetched, or its copy in
            the cache is not whole.
    """
    local = _local(model)
    if local is not None:
        return local
    if "://" in model:
        raise DFlashError(
            f"the drafter {model!r} is an address, which dflash-plugin does not fetch: copy it to "
            "a directory and give that, or set DFLASH_PLUGIN=off to leave it to the engine"
        )
    return _fetch(model, source, PATTERNS)


def config_of(model: str, source: Source) -> dict[str, Any] | None:
    """config.json of a directory or repository, or None where there is none to be read."""
    directory = _local(model)
    try:
        if directory is None:
            # What has no organization is no drafter's repository but a method or a class.
            if model.count("/") != 1 or model.startswith(("/", ".", "~")):
                return None
            directory = _fetch(model, source, (CONFIG,))
        return read_json(directory / CONFIG)
    except DFlashError:
        return None


def config_at_hand(model: str, revision: str | None) -> dict[str, Any] | None:
    """config.json of a directory, or of a copy in the hub's own cache; no hub is asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    directory = _local(model)
    try:
        found = try_to_load_from_cache(model, CONFIG, revision=revision) if not directory else None
        path = directory / CONFIG if directory else found
        return read_json(Path(path)) if isinstance(path, str | Path) else None
    except (DFlashError, HFValidationError):
        return None


def is_offline() -> bool:
    """Whether the hub must not be asked, by ``HF_HUB_OFFLINE`` when its library was imported."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _local(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path.resolve() if path.is_dir() else None
    except (RuntimeError, OSError):
        return None


def _fetch(model: str, source: Source, patterns: Sequence[str]) -> Path:
    """The directory of a repository's copy, which has at least config.json."""
    try:
        return _fetch_once(model, source, patterns)
    except DFlashError:
        if source.download_dir is not None and is_offline():
            # An engine keeps configurations in the hub's cache and weights alone in download_dir.
            with suppress(DFlashError):
                return _fetch_once(model, source._replace(download_dir=None), patterns)
        raise


def _fetch_once(model: str, source: Source, patterns: Sequence[str]) -> Path:
    fetch = _fetch_from_modelscope if source.modelscope else _fetch_from_hugging_face
    found = fetch(model, source, patterns)
    if not (found / CONFIG).is_file():
        raise DFlashError(
            f"the copy of the drafter {model!r} in {str(found)!r} has no {CONFIG}: "
            + ("fetch it again without HF_HUB_OFFLINE" if is_offline() else "check its name")
            + ", or give the directory of a whole one"
        )
    return found


def _fetch_from_hugging_face(model: str, source: Source, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                model,
                revision=source.revision,
                cache_dir=source.download_dir,
                token=source.token,
                allow_patterns=list(patterns),
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise _unavailable(model, source, "the Hugging Face hub", error) from error


def _fetch_from_modelscope(model: str, source: Source, patterns: Sequence[str]) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise DFlashError(
            f"the drafter {model!r} is to come from ModelScope, whose package is missing: "
            "pip install modelscope, or give the drafter's directory"
        ) from error
    try:
        return Path(
            snapshot_download(
                model,
                revision=source.revision,
                cache_dir=source.download_dir,
                local_files_only=is_offline(),
                allow_patterns=list(patterns),
            )
        )
    except Exception as error:  # Its errors have no common base.
        raise _unavailable(model, source, "ModelScope", error) from error


def _unavailable(model: str, source: Source, hub: str, error: Exception) -> DFlashError:
    revision = "" if source.revision is None else f" at revision {source.revision!r}"
    return DFlashError(
        f"the drafter {model!r} is neither a directory nor a repository{revision} that can be "
        f"fetched from {hub} ({reason(error)}): check the name, the revision and the token, or "
        "fetch it first and give its directory"
    )
