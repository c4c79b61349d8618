"""Loading targets and drafters for the Transformers engine."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from socket import gaierror
from typing import Any
from urllib.error import URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dflash_plugin.checkpoints.files import whole_shards
from dflash_plugin.checkpoints.hub import looks_like_path
from dflash_plugin.checkpoints.io import Checkpoint, load_checkpoint
from dflash_plugin.checkpoints.target_differences import warn_of_differences
from dflash_plugin.checkpoints.tensors import build_drafter
from dflash_plugin.checkpoints.vocabulary import fitted, fitted_config, has_tables
from dflash_plugin.drafter.config import Dialect, DraftWeights
from dflash_plugin.drafter.fp8_linear import quantize_drafter
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.target_embedding import embedding_factor
from dflash_plugin.errors import DFlashError, reason


def load_target(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    gguf_file: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        directory: a model directory, or a name that Transformers resolves.
        dtype: float32 on a CPU and bfloat16 on a GPU when None.
        device: the first GPU if there is one when None.
        gguf_file: name of a GGUF file in the directory to load instead of safetensors.

    Raises:
        DFlashError: there is no such model, a file is missing or truncated, Transformers cannot
            load it as a causal language model, it has no tokenizer, or the device is unusable.
    """
    target_device = usable_device(device)
    dtype = dtype or (torch.float32 if target_device.type == "cpu" else torch.bfloat16)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    source = model_source(directory)
    if isinstance(source, Path):
        _check_files(source, gguf_file)
    else:
        options["local_files_only"] = not hub_answers()
    try:
        model = _from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        where = "" if isinstance(source, Path) else _where_searched(options["local_files_only"])
        raise DFlashError(
            f"{str(directory)!r} does not load as a causal language model ({reason(error)})"
            f"{where}: give a model directory with config.json, *.safetensors and a tokenizer, or "
            "the name 'smollm2'"
        ) from error
    return model.to(target_device).eval(), _load_tokenizer(source, options)


def _from_pretrained(source: str | Path, **options: Any) -> PreTrainedModel:
    """The model with torch's attention, or with its own where it takes no other.

    The engine replaces either.
    """
    load = AutoModelForCausalLM.from_pretrained
    try:
        return load(source, attn_implementation="sdpa", **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return load(source, attn_implementation="eager", **options)


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, or the first GPU if there is one, else the CPU.

    Raises:
        DFlashError: there is no such device, or this torch cannot use it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DFlashError(
            f"device is {str(device)!r}, which torch {torch.__version__} cannot use "
            f"({reason(error)}): give 'cpu', or 'cuda' with a GPU and a torch built for it"
        ) from error
    return found


def model_source(name: str | Path) -> Path | str:
    """A model directory, or a name that a hub or its local cache may know.

    Raises:
        DFlashError: the value is a path, and no directory is there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if isinstance(name, Path) or looks_like_path(name):
        state = "is not a directory" if path.exists() else "is not there"
        raise DFlashError(
            f"the model {str(name)!r} {state}: give the path of a directory with config.json, "
            "*.safetensors and a tokenizer"
        )
    return name


def hub_answers(seconds: float = 10.0) -> bool:
    """Whether the model hub can be reached; its client would retry for most of a minute.

    What the client may settle by itself, such as a certificate of a proxy, counts as an answer.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(HttpRequest(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
    except (TimeoutError, ConnectionError):
        return False
    except URLError as error:
        return not isinstance(error.reason, TimeoutError | ConnectionError | gaierror)
    except HTTPException:
        return True
    return True


def _where_searched(only_locally: bool) -> str:
    if only_locally:
        return ", is no directory here, is not in the local cache, and the hub cannot be reached"
    return ", is no directory here, and the hub does not give it"


def _check_files(directory: Path, gguf_file: str | None) -> None:
    """Name a missing or truncated file before Transformers reads any."""
    if gguf_file is not None:
        if not (directory / gguf_file).is_file():
            raise DFlashError(f"{directory}: {gguf_file} is missing: fetch the model again")
        return
    if not (directory / "config.json").is_file():
        raise DFlashError(f"{directory}: config.json is missing: give a model directory")
    try:
        whole_shards(directory)
    except DFlashError as error:
        raise DFlashError(f"{directory}: {error}") from None


def _load_tokenizer(source: Path | str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # Transformers raises many kinds here.
    except Exception as error:
        raise DFlashError(
            f"{source}: the tokenizer does not load ({reason(error)}): put tokenizer.json and "
            "tokenizer_config.json of the model beside its weights"
        ) from error
    # Without files, Transformers makes a tokenizer that knows its special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DFlashError(
            f"{source}: there is no tokenizer: put tokenizer.json and tokenizer_config.json of the "
            "model beside its weights"
        )
    return tokenizer


def load_drafter(
    directory: str | Path,
    target: PreTrainedModel,
    dtype: torch.dtype | None = None,
    weights: DraftWeights = "checkpoint",
    dialect: Dialect | None = None,
) -> Drafter:
    """Load a drafter of any dialect and lend it the target's embedding and head.

    Args:
        directory: a drafter checkpoint.
        target: the model that it drafts for.
        dtype: the target's when None.
        weights: "fp8" rounds the linears of the draft pass to FP8, see ``fp8``.
        dialect: overrides detection.

    Raises:
        DFlashError: the checkpoint is malformed or was made for another target.
    """
    drafter = bound(load_checkpoint(Path(directory), dtype or target.dtype, dialect), target)
    if weights == "fp8":
        quantize_drafter(drafter)
    return drafter


def bound(checkpoint: Checkpoint, target: PreTrainedModel) -> Drafter:
    """The drafter of a checkpoint, on the target's device, with its embedding and head.

    Raises:
        DFlashError: it was made for another target.
    """
    tokens = target.get_input_embeddings().weight.shape[0]
    layers = target.config.get_text_config().num_hidden_layers
    warn_of_differences(checkpoint.directory, checkpoint.config, layers, tokens)
    drafter = build_drafter(fitted(checkpoint, tokens)).to(target.device)
    bind_drafter(drafter, target)
    return drafter


def bind_drafter(drafter: Drafter, target: PreTrainedModel) -> None:
    """Lend the target's embedding and head to a drafter, checking that the two fit.

    Raises:
        DFlashError: names the first thing that does not fit.
    """
    text = target.config.get_text_config()
    embedding, config = target.get_input_embeddings().weight, drafter.config
    config.require_target(text.hidden_size, text.num_hidden_layers)
    tokens = embedding.shape[0]
    fitted_config(config, tokens)
    if has_tables(config) and config.vocab_size != tokens:
        raise DFlashError(
            f"the drafter has tables of {config.vocab_size} rows but the target has {tokens} "
            "tokens: load its checkpoint with load_drafter, which fits them"
        )
    drafter.borrow(embedding, target.get_output_embeddings(), factor=embedding_factor(text))
