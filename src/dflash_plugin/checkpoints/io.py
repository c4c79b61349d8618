"""Drafter checkpoints on disk: safetensors in, safetensors out, every tensor checked.

Canonical tensor names are z-lab's (PyPI dflash 0.1.0).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dflash_plugin.checkpoints.dialects import (
    read_config,
    rules_applied,
    with_block,
    write_config,
)
from dflash_plugin.checkpoints.files import (
    MASK_EMBEDDING,
    STORE_PLAIN,
    local_path,
    read_header,
    read_json,
    whole_shards,
)
from dflash_plugin.checkpoints.fused import part_rows, split_fused
from dflash_plugin.checkpoints.latent_tensors import latent_tensors
from dflash_plugin.checkpoints.notices import warn_once
from dflash_plugin.checkpoints.pickles import pickle_files, read_pickles
from dflash_plugin.checkpoints.quantization import PLAIN, dequantise
from dflash_plugin.checkpoints.quantization_config import declared
from dflash_plugin.drafter.config import Dialect, DrafterConfig
from dflash_plugin.errors import OFF, DFlashError, reason

logger = logging.getLogger("dflash_plugin")

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
CODEBOOKS = (
    "candidate_selector.predecessor_codebook",
    "candidate_selector.successor_codebook",
)
# Buffers and frozen copies of the target's tensors that some exporters leave in.
IGNORED = re.compile(r".*rotary_emb\..*|verifier_(norm|lm_head)\..*")
# Tensors whose values decide whether a checkpoint is read: small ones.
_VALUES = (".weight_shape", ".weight_global_scale", ".weight_scale_2", "d2t", "t2d")
_RENAMED = (
    # What wrappers of a module put in front.
    (re.compile(r"^(module\.|_orig_mod\.)+"), ""),
    (re.compile(r"^model\."), ""),
    (re.compile(r"^encoder\.fc\."), "fc."),
    (re.compile(r"^encoder\.output_norm_enc\."), "hidden_norm."),
    (re.compile(r"^midlayer\."), "layers.0."),
    (re.compile(r"\.self_attn\.sinks$"), ".self_attn.attention_sink_bias"),
    # As the module of PyPI dflash has it; z-lab's files do not.
    (re.compile(r"^(candidate_selector\.\w+_codebook)\.weight$"), r"\1"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and checked.

    Attributes:
        config: what the drafter is.
        tensors: canonical names; shapes as ``expected_tensors`` says.
        directory: where it was read from.
        raw: config.json as it was read.
    """

    config: DrafterConfig
    tensors: dict[str, Tensor]
    directory: Path
    raw: dict[str, Any]


def expected_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of every tensor that a drafter has."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(config.target_layer_ids) * config.target_hidden_size),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    latent = config.latent_attention
    attention = {
        "self_attn.q_proj": (query, hidden, config.attention_bias),
        "self_attn.k_proj": (kv, hidden, config.attention_bias),
        "self_attn.v_proj": (kv, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, query, config.attention_output_bias),
    }
    linears = {
        **(attention if latent is None else {}),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    if config.attention_gate:
        factors = config.num_attention_heads if config.attention_gate == "per-head" else query
        linears["self_attn.g_proj"] = (factors, hidden, False)
    if config.norm_per_tap:
        for tap in range(len(config.target_layer_ids)):
            shapes[f"aux_hidden_norms.{tap}.weight"] = (config.target_hidden_size,)
    for index in range(len(config.layers)):
        layer = f"layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        if latent is not None:
            parts = latent_tensors(config, latent).items()
            shapes |= {f"{layer}.self_attn.{name}": shape for name, shape in parts}
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (dim,)
        if config.attention_sinks:
            shapes[f"{layer}.self_attn.attention_sink_bias"] = (config.num_attention_heads,)
        if config.convolution is not None:
            taps = config.convolution.kernel_size
            rows = 2 * taps * (hidden // config.convolution.group_size)
            for name in ("attention_conv", "mlp_conv"):
                shapes[f"{layer}.{name}.base_kernel"] = (2, taps, hidden)
                shapes[f"{layer}.{name}.kernel_projection.weight"] = (rows, hidden)
    if config.selector is not None:
        rank = config.selector.rank
        shapes.update(dict.fromkeys(CODEBOOKS, (config.vocab_size, rank)))
        shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
    if config.own_embedding:
        shapes["embed_tokens.weight"] = (config.vocab_size, hidden)
    if config.own_head:
        shapes["lm_head.weight"] = (config.draft_vocab_size or config.vocab_size, hidden)
    if config.own_mask_embedding:
        shapes["mask_embedding"] = (hidden,)
    if config.draft_vocab_size:
        shapes["d2t"] = (config.draft_vocab_size,)
    return shapes


def load_checkpoint(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    dialect: Dialect | None = None,
    *,
    pickles: bool = False,
    drafts: int | None = None,
) -> Checkpoint:
    """Read a drafter of any dialect; quantised weights become the plain ones that they stand for.

    Args:
        directory: holds config.json and one or more .safetensors files.
        dtype: floating-point tensors become this; that of the stored ``fc.weight`` when None, or
            of the norms where that is quantised, whatever config.json says.
        dialect: overrides detection, for files that do not say enough.
        pickles: read weights that are pickled, too; torch unpickles tensors alone and runs no code.
        drafts: tokens that a block drafts, for a file that names no block.

    Raises:
        DFlashError: names the file, field or tensor that is wrong and the fix; nothing is loaded.
    """
    with _naming(directory) as path:
        return _load(path, dtype, dialect, pickles, drafts)


def load_config(
    directory: str | Path, dialect: Dialect | None = None, *, drafts: int | None = None
) -> DrafterConfig:
    """What a drafter is, from config.json and the headers of its tensor files.

    Args:
        directory: holds config.json and one or more .safetensors files.
        dialect: overrides detection.
        drafts: tokens that a block drafts, for a file that names no block.

    Raises:
        DFlashError: names the file, field or tensor that is wrong and the fix.
    """
    with _naming(directory) as path:
        _, tensors, config = _read(path, dialect, headers_only=True, drafts=drafts)
        to_target = tensors.pop("t2d", None)
        check_names_and_shapes(tensors, config)
        _check_dtypes(tensors)
        check_vocabulary_map(tensors, to_target, config)
        return config


@contextmanager
def _naming(directory: str | Path) -> Iterator[Path]:
    """Put the directory in front of what goes wrong in the block."""
    path = local_path(directory)
    try:
        yield path
    except DFlashError as error:
        raise DFlashError(f"{path}: {error}") from error
    except OSError as error:
        raise DFlashError(
            f"{path} cannot be read ({reason(error)}): check the directory and who may read it"
        ) from error


def _read(
    directory: Path,
    dialect: Dialect | None,
    headers_only: bool,
    pickles: bool = False,
    drafts: int | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], DrafterConfig]:
    """config.json, the tensors (without values if only their headers are read), and the drafter."""
    if not directory.is_dir():
        what = "not a directory" if directory.exists() else "not a directory, there is nothing"
        raise DFlashError(f"{what}: give a drafter checkpoint's directory")
    raw = read_json(directory / CONFIG)
    quantization = declared(raw, directory)
    stored = read_tensors(directory, headers_only, pickles)
    plain = dequantise(stored, quantization, partial(part_rows, raw=raw))
    if not headers_only:
        _log_quantization(directory, plain.quantization, plain.ignored)
    tensors = split_fused({canonical(name): t for name, t in plain.tensors.items()}, raw)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = read_config(with_block(raw, drafts), shapes, dialect)
    for rule in rules_applied(raw, config, dialect).values():
        warn_once(directory, rule)
    config = config.model_copy(update={"quantization": plain.quantization})
    return raw, without_padding(tensors, config), config


def _log_quantization(directory: Path, quantization: str | None, ignored: list[str]) -> None:
    if quantization is not None:
        logger.info(
            "%s: the checkpoint is quantised (%s): dequantised at load; in vLLM and SGLang "
            "draft_weights says what becomes of it",
            *(directory, quantization),
        )
    if ignored:
        logger.info(
            "%s: %d scales of activations and of the KV cache are ignored, the first is %s",
            directory,
            len(ignored),
            ignored[0],
        )


def without_padding(tensors: dict[str, Tensor], config: DrafterConfig) -> dict[str, Tensor]:
    """The tensors, without rows of tables that stand for no token of ``vocab_size``."""
    expected = expected_tensors(config)
    for name in (EMBEDDING, HEAD, *CODEBOOKS):
        if name in tensors and name in expected:
            tensors[name] = tensors[name][: expected[name][0]]
    return tensors


def _load(
    directory: Path,
    dtype: torch.dtype | None,
    dialect: Dialect | None,
    pickles: bool,
    drafts: int | None,
) -> Checkpoint:
    raw, tensors, config = _read(directory, dialect, False, pickles, drafts)
    to_target = tensors.pop("t2d", None)
    check_names_and_shapes(tensors, config)
    stored = tensors["fc.weight"].dtype
    convert_values(tensors, dtype or stored)
    check_vocabulary_map(tensors, to_target, config)
    config = config.model_copy(update={"dtype": str(stored).removeprefix("torch.")})
    return Checkpoint(config, tensors, directory, raw)


def read_tensors(directory: Path, headers_only: bool, pickles: bool) -> dict[str, Tensor]:
    """Every tensor of every shard, as it is stored, under canonical names.

    Args:
        directory: of the checkpoint.
        headers_only: give tensors on the meta device, but for ``weight_shape``.
        pickles: read pickled tensors, too.

    Raises:
        DFlashError: a file is missing, broken or refused.
    """
    shards = whole_shards(directory)
    pickled = pickle_files(directory, has_shards=bool(shards))
    unpickled = read_pickles(pickled) if pickles else {}
    if pickled and not pickles:
        raise DFlashError(
            f"{pickled[0].name} is a pickle file, which can run code and is refused: "
            "`dflash-plugin convert` writes its tensors to safetensors and runs none (or do so "
            f"with safetensors.torch.save_file); {OFF}"
        )
    if not shards and not pickled:
        raise DFlashError("there is no .safetensors file: give a checkpoint with its weights")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                names = list(file.keys())
                for stored in names:
                    name = canonical(stored)
                    if shard.stem == MASK_EMBEDDING and len(names) == 1:
                        # By any name, as in a pickle.
                        tensors[MASK_EMBEDDING] = file.get_tensor(stored).flatten()
                        continue
                    if IGNORED.fullmatch(name):
                        continue
                    if name in tensors:
                        raise DFlashError(
                            f"tensor {name!r} stands twice, again in {shard.name}: remove one"
                        )
                    if headers_only and not name.endswith(_VALUES):
                        tensors[name] = read_header(file, stored)
                    else:
                        tensors[name] = file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise DFlashError(
                f"{shard.name} is not a whole safetensors file ({error}): fetch it again"
            ) from error
    unpickled = {canonical(name): tensor for name, tensor in unpickled.items()}
    kept = {name: tensor for name, tensor in unpickled.items() if not IGNORED.fullmatch(name)}
    return {**tensors, **kept}


def canonical(name: str) -> str:
    """A tensor's name as z-lab writes it."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def check_names_and_shapes(
    tensors: Mapping[str, Tensor], config: DrafterConfig, whole: bool = True
) -> None:
    """Check that tensors are those of a drafter.

    Args:
        tensors: canonical names.
        config: of the drafter.
        whole: none may be missing.

    Raises:
        DFlashError: names the tensor that is missing, has another shape or does not belong here.
    """
    expected = expected_tensors(config)
    for name, shape in expected.items():
        if name not in tensors:
            if not whole:
                continue
            raise DFlashError(f"tensor {name!r} {list(shape)} is missing: {_advice(name)}")
        if tuple(tensors[name].shape) != shape:
            raise DFlashError(
                f"tensor {name!r} has shape {list(tensors[name].shape)} but config.json makes it "
                f"{list(shape)}: correct the sizes in config.json or the file"
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise DFlashError(
            f"tensor {extra[0]!r} does not belong to a DFlash drafter with this config.json: "
            f"{_advice(extra[0])}"
        )


def _advice(name: str) -> str:
    hints = {
        "q_norm": "without norms on q and k, config.json must say qk_norm: false",
        "k_norm": "without norms on q and k, config.json must say qk_norm: false",
        "g_proj": f"check gating in config.json and that architectures is a gated drafter's; {OFF}",
        "aux_hidden_norms": f"norms of target layers belong to a Laguna drafter; {OFF}",
        "mlp.": "check mlp_bias and intermediate_size in config.json",
        "_a_proj": "check attention_mode and q_lora_rank in config.json",
        "_b_proj": "check attention_mode and q_lora_rank in config.json",
        "_a_layernorm": "check attention_mode and q_lora_rank in config.json",
        ".bias": "check attention_bias in config.json",
        "attention_sink_bias": "check attention_sink_bias in config.json",
        "d2t": "d2t belongs to draft_vocab_size below vocab_size",
        "_conv.": "convolutions belong to a DFlash 2 drafter, check architectures in config.json",
        "candidate_selector.": "a selector belongs to a DFlash 2 drafter, check architectures in "
        "config.json",
        "layers.": "check num_hidden_layers in config.json",
    }
    found = (hint for part, hint in hints.items() if part in name)
    return next(found, "give a complete, unmodified checkpoint")


def convert_values(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Check values, and convert them in place: to ``dtype``, those of ``d2t`` to int64.

    Raises:
        DFlashError: a tensor is not plain, or has values that are not finite.
    """
    _check_dtypes(tensors)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DFlashError(
                f"tensor {name!r} has values that are not finite: train or fetch again"
            )
        tensors[name] = tensor.to(torch.int64 if name == "d2t" else dtype)


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if name == "d2t":
            if tensor.dtype not in (torch.int64, torch.int32):
                raise DFlashError(f"tensor 'd2t' is {dtype}: store int64 offsets")
        elif tensor.dtype not in PLAIN:
            raise DFlashError(f"tensor {name!r} is {dtype}: {STORE_PLAIN}")


def check_vocabulary_map(
    tensors: Mapping[str, Tensor], to_target: Tensor | None, config: DrafterConfig
) -> None:
    """Check the offsets of a reduced vocabulary, if the drafter has one.

    Args:
        tensors: ``d2t`` among them, on the CPU.
        to_target: the marks ``t2d``, if there are any.
        config: of the drafter.

    Raises:
        DFlashError: the map names a token that is not there, or one of them twice.
    """
    if config.draft_vocab_size is None:
        return
    ids = tensors["d2t"].long() + torch.arange(config.draft_vocab_size)
    bad = ((ids < 0) | (ids >= config.vocab_size)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise DFlashError(
            f"d2t maps draft token {row} to {int(ids[row])}, outside the vocabulary of "
            f"{config.vocab_size}: d2t holds offsets, target id minus draft id"
        )
    if len(ids.unique()) != len(ids):
        raise DFlashError("d2t maps two draft tokens to one target token: write the map again")
    if to_target is None:
        return
    expected = torch.zeros(config.vocab_size, dtype=torch.bool)
    expected[ids] = True
    if tuple(to_target.shape) != tuple(expected.shape) or bool(
        (to_target.bool() != expected).any()
    ):
        raise DFlashError("t2d does not mark the tokens that d2t names: write both maps again")


def save_checkpoint(
    directory: str | Path,
    config: DrafterConfig,
    tensors: Mapping[str, Tensor],
    dialect: Dialect = "z-lab",
    overwrite: bool = False,
) -> Path:
    """Write a drafter; each file appears whole or not at all.

    Args:
        directory: made if need be.
        config: what the drafter is; its dtype is taken from the tensors.
        tensors: canonical names.
        dialect: the dialect of the written files.
        overwrite: replace a checkpoint that is already there.

    Raises:
        DFlashError: the dialect cannot express the drafter, a tensor is wrong, or a checkpoint is
            in the way; nothing is written then.
    """
    directory = Path(directory)
    if (directory / WEIGHTS).exists() and not overwrite:
        raise DFlashError(
            f"{directory / WEIGHTS} is already there: choose another directory or overwrite it"
        )
    dtype = str(tensors["norm.weight"].dtype).removeprefix("torch.")
    config = config.model_copy(update={"dtype": dtype, "dialect": dialect, "quantization": None})
    check_names_and_shapes(tensors, config)
    written = write_config(config, dialect)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if dialect == "speculators" and config.draft_vocab_size:
        marks = torch.zeros(config.vocab_size, dtype=torch.bool)
        marks[stored["d2t"] + torch.arange(config.draft_vocab_size)] = True
        stored["t2d"] = marks
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DFlashError(
            f"{directory} cannot be made ({reason(error)}): choose another directory"
        ) from error
    try:
        with replacing(directory / WEIGHTS) as path:
            save_file(stored, path, metadata={"format": "pt"})
        with replacing(directory / CONFIG) as path:
            path.write_text(json.dumps(written, indent=2) + "\n")
    except (SafetensorError, OSError) as error:
        raise DFlashError(
            f"{directory} cannot be written ({reason(error)}): choose another directory"
        ) from error
    return directory


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of ``path`` when the block ends well.

    No other writer has the same one, even where containers with equal process numbers share a home.
    """
    scratch = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
