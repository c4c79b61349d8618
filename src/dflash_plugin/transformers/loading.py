"""Loading targets and drafters for the Transformers engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dflash_plugin.checkpoints.io import Checkpoint, load_checkpoint
from dflash_plugin.checkpoints.tensors import build_drafter
from dflash_plugin.drafter.config import Dialect, DraftWeights
from dflash_plugin.drafter.fp8_linear import quantize_drafter
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError


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
        DFlashError: Transformers cannot load it as a causal language model.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    extra: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", **extra
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, **extra)
    except (OSError, ValueError, KeyError) as error:
        raise DFlashError(
            f"{str(directory)!r} does not load as a causal language model ({error}): give a model "
            "directory with config.json, *.safetensors and a tokenizer, or the name 'smollm2'"
        ) from error
    return model.to(place).eval(), tokenizer


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
    drafter = build_drafter(checkpoint).to(target.device)
    bind_drafter(drafter, target)
    return drafter


def bind_drafter(drafter: Drafter, target: PreTrainedModel) -> None:
    """Lend the target's embedding and head to a drafter, checking that the two fit.

    Raises:
        DFlashError: names the first thing that does not fit.
    """
    text = target.config.get_text_config()
    embedding = target.get_input_embeddings().weight
    drafter.config.require_target(text.hidden_size, text.num_hidden_layers, embedding.shape[0])
    drafter.borrow(embedding, target.get_output_embeddings())
