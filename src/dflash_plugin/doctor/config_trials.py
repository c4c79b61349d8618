"""Settings of config.json that may be wrong: dialect, mask token, rope, windows, norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dflash_plugin.checkpoints.dialects import DIALECTS, read_config
from dflash_plugin.checkpoints.dialects.rope import read_rope
from dflash_plugin.checkpoints.io import Checkpoint, expected_tensors
from dflash_plugin.doctor.trials import Search, Setting, Trials
from dflash_plugin.drafter.config import DrafterConfig, LayerAttention, RopeConfig
from dflash_plugin.errors import DFlashError

THETAS = (1e4, 1e5, 5e5, 1e6, 5e6, 1e7)
WINDOWS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MASK_TOKENS = 32


def search_dialect(trials: Trials, checkpoint: Checkpoint) -> Search:
    """A file that means something else when it is read as another dialect."""
    config = trials.drafter.config
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    settings = []
    for dialect in DIALECTS:
        try:
            other = read_config(checkpoint.raw, shapes, dialect)
        except DFlashError:
            continue
        other = other.model_copy(update={"dialect": config.dialect, "dtype": config.dtype})
        if expected_tensors(other) == expected_tensors(config):
            settings.append(
                Setting(
                    f"reading config.json as {dialect} instead of {config.dialect}",
                    other,
                    f"dflash-plugin convert {checkpoint.directory} FIXED --to {dialect} --dialect "
                    f"{dialect}, or serve it with the plugin's option dialect: {dialect}",
                    0,
                )
            )
    return Search(
        "dialect",
        f"config.json read as {config.dialect}, against every other dialect that can read it",
        settings,
        f"read as {config.dialect}",
    )


def mask_tokens(tokenizer: Any, embedding: Tensor) -> dict[int, str]:
    """Tokens that may stand for "to be drafted", by id; those with equal embeddings once."""
    roles = ("mask_token", "pad_token", "unk_token", "bos_token", "eos_token")
    named = [getattr(tokenizer, role, None) for role in roles]
    words = [str(word) for word in named if word] + list(tokenizer.get_added_vocab())
    found: dict[int, str] = {}
    for word in words[:MASK_TOKENS]:
        token = tokenizer.convert_tokens_to_ids(word)
        if isinstance(token, int) and 0 <= token < embedding.shape[0]:
            found.setdefault(token, word)
    if not found:
        return found
    rows = embedding[torch.tensor(list(found), device=embedding.device)]
    _, groups = rows.unique(dim=0, return_inverse=True)
    first: dict[int, int] = {}
    for group, token in zip(groups.tolist(), found, strict=True):
        first.setdefault(group, token)
    return {token: found[token] for token in first.values()}


def search_mask(trials: Trials, tokenizer: Any, directory: Path) -> Search:
    """Another token than the one that stood for "to be drafted" in training."""
    config = trials.drafter.config
    looked_at = f"mask token {config.mask_token_id} against the tokenizer's special tokens"
    if config.own_mask_embedding:
        well = "the checkpoint carries the mask's embedding, so that no token is looked up"
        return Search("mask token", looked_at, [], well)
    embedding = trials.texts.target.get_input_embeddings().weight
    settings = [
        Setting(
            f"mask token {token} {word!r} instead of {config.mask_token_id}",
            config.model_copy(update={"mask_token_id": token}),
            f"set mask_token_id to {token} in {directory / 'config.json'}",
        )
        for token, word in mask_tokens(tokenizer, embedding).items()
    ]
    return Search("mask token", looked_at, settings, str(config.mask_token_id))


def search_rope(trials: Trials, directory: Path) -> Search:
    """Rotation with another base, scaling or pairing than in training."""
    config = trials.drafter.config
    own = config.rope
    target = target_rope(trials.texts.target)
    changes: list[tuple[str, dict[str, Any], str, int]] = []
    if target is not None:
        changes.append(
            (
                f"the target's rotation (theta {target.theta:g}, {target.type})",
                {"theta": target.theta, "type": target.type, "parameters": target.parameters},
                f"set rope_theta to {target.theta:g} and rope_scaling as in the target's",
                0,
            )
        )
    changes += [
        (f"rope theta {theta:g} instead of {own.theta:g}", {"theta": theta},
         f"set rope_theta to {theta:g}", 1)
        for theta in THETAS
    ]  # fmt: skip
    changes += [
        ("rope without scaling", {"type": "default", "parameters": {}}, "remove rope_scaling", 1),
        (
            f"{'NeoX' if own.interleaved else 'interleaved'} rotation",
            {"interleaved": not own.interleaved},
            f"set is_neox_style to {'true' if own.interleaved else 'false'}",
            1,
        ),
    ]
    settings = [
        Setting(
            label,
            config.model_copy(update={"rope": own.model_copy(update=change)}),
            f"{fix} in {directory / 'config.json'}",
            rank,
        )
        for label, change, fix, rank in changes
    ]
    shown = "" if target is None else f" (the target's: {target.theta:g}, {target.type})"
    return Search(
        "rope",
        f"theta {own.theta:g}, type {own.type}, {'interleaved' if own.interleaved else 'NeoX'} "
        f"against the target's and common values{shown}",
        settings,
        f"theta {own.theta:g}, {own.type}",
    )


def target_rope(target: Any) -> RopeConfig | None:
    """The target's rotation, where a drafter can have such a one."""
    text = target.config.get_text_config()
    try:
        return RopeConfig(**read_rope(text.to_dict(), default_theta=10000.0))
    except (DFlashError, ValidationError):
        return None


def search_attention(trials: Trials, directory: Path) -> Search:
    """A window that is too small or too large, or causality unlike training."""
    config = trials.drafter.config
    text = trials.texts.target.config.get_text_config()
    length = int(trials.texts.batch.lengths.max())
    windows = sorted({layer.sliding_window for layer in config.layers}, key=lambda w: w or 0)
    shown = ", ".join(f"window {w}" if w else "full" for w in windows)
    causality = "causal" if config.layers[0].causal else "not causal"
    path = directory / "config.json"

    def layers(**change: Any) -> DrafterConfig:
        changed = tuple(layer.model_copy(update=change) for layer in config.layers)
        return config.model_copy(update={"layers": changed})

    def window_of(size: int, whose: str) -> Setting:
        return Setting(
            f"{whose} {size} in every layer instead of {shown}",
            layers(sliding_window=size),
            f"set sliding_window to {size} and layer_types to sliding_attention in {path}",
        )

    flipped = tuple(
        LayerAttention(sliding_window=layer.sliding_window, causal=not layer.causal)
        for layer in config.layers
    )
    settings = [
        Setting(
            f"no window instead of {shown}",
            layers(sliding_window=None),
            f"set sliding_window to what the drafter was trained with in {path}: more than "
            f"{windows[-1] or 0}, or layer_types to full_attention",
            0,
        ),
        Setting(
            "the other causality in every layer",
            config.model_copy(update={"layers": flipped}),
            f"set is_causal to {'false' if config.layers[0].causal else 'true'} in {path}",
        ),
    ]
    target_window = getattr(text, "sliding_window", None)
    if target_window:
        settings.append(window_of(target_window, "the target's window of"))
    settings += [window_of(size, "a window of") for size in WINDOWS if size < length]
    if any(windows):
        other = "anchor" if config.window_from == "query" else "query"
        settings.append(
            Setting(
                f"a window that counts from the {other}",
                config.model_copy(update={"window_from": other}),
                "convert the checkpoint to the dialect that it was trained in",
            )
        )
    return Search(
        "window and causality",
        f"{shown}, {causality}, against no window, the target's window, common ones and the other "
        "causality",
        settings,
        f"{shown}, {causality}",
        blind=[f"windows of {length} positions and more, since no text is longer"],
    )


def search_norms(trials: Trials, directory: Path) -> Search:
    """Norms that multiply by 1 + weight, and embeddings that are scaled, as Gemma's."""
    config, path = trials.drafter.config, directory / "config.json"
    other = "rms" if config.norm_style == "gemma" else "gemma"
    now = trials.drafter.embedding_scale
    settings = [
        Setting(
            f"{other} norms instead of {config.norm_style}",
            config.model_copy(update={"norm_style": other}),
            f"set use_gemma_norm to {'true' if other == 'gemma' else 'false'} in {path}",
        )
    ]
    settings += [
        Setting(
            f"embeddings times {scale:.4g} instead of {now:.4g}",
            config.model_copy(update={"embedding_scale": scale}),
            f"set input_embedding_scale to {scale:.6g} in {path}",
        )
        for scale in (1.0, config.hidden_size**0.5)
        if scale != now
    ]
    return Search(
        "norms",
        f"{config.norm_style} norms and embeddings times {now:.4g}, against the "
        "other norms, plain embeddings and those times √hidden_size",
        settings,
        f"{config.norm_style} norms",
    )
