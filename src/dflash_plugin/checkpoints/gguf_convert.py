"""From a GGUF file to a model directory that Transformers, vLLM and SGLang load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dflash_plugin.checkpoints.gguf_models import GgufModel
from dflash_plugin.errors import DFlashError


def convert_gguf(gguf: Path, model: GgufModel, directory: Path) -> None:
    """Write a GGUF file as a plain model directory.

    The directory holds config, safetensors, tokenizer, chat template, generation config and card.

    Args:
        gguf: the file.
        model: what it is.
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
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=model.dtype, **options
        )
    except (ImportError, ValueError) as error:
        raise DFlashError(
            f"Transformers {transformers.__version__} cannot read {gguf.name!r} ({error}): install "
            "what it names"
        ) from error
    # What is saved is a plain model, so nothing may claim that it is quantized.
    loaded.config.__dict__.pop("quantization_config", None)
    loaded.hf_quantizer, loaded.is_quantized = None, False
    loaded.config._name_or_path = ""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _mend_tokenizer(tokenizer, model, loaded.config)
    loaded.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(_card(model))


def _mend_tokenizer(tokenizer: Any, model: GgufModel, config: Any) -> None:
    """Restore what GGUF only names: how a text is split before byte-level BPE.

    Transformers does not know every name and converts to GPT-2's splitting. Its 5.12 also makes
    the BOS token the EOS token, so those are set from the model's config.
    """
    from tokenizers import AddedToken, decoders

    backend = tokenizer.backend_tokenizer
    PRE_TOKENIZERS[model.pre_tokenizer](backend)
    backend.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.max_position_embeddings
    names = tokenizer.convert_ids_to_tokens(list(model.added_tokens))
    tokenizer.add_tokens([AddedToken(n, normalized=False, special=n[:2] == "<|") for n in names])
    for role in ("bos", "eos", "pad", "unk"):
        index = getattr(config, f"{role}_token_id", None)
        if index is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(index))


def _split_as_smollm(backend: Any) -> None:
    """Digits one by one, the rest as GPT-2 does (llama.cpp's ``llama-vocab.cpp``)."""
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _split_as_qwen2(backend: Any) -> None:
    """Qwen2's expression over NFC text (Transformers' ``tokenization_qwen2.py``)."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[Any], None]] = {
    "smollm": _split_as_smollm,
    "qwen2": _split_as_qwen2,
}


def _card(model: GgufModel) -> str:
    """The README of a model directory."""
    packages = ", ".join(f"`{part.requirement}`" for part in model.slices)
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"---\nlicense: apache-2.0\n---\n# {model.title}, dequantised {model.quantization}\n\n"
        f"{dtype} weights, dequantised from the {model.quantization} GGUF file that these Python "
        f"packages carry: {packages}. They are not the weights of the original release.\n"
    )
