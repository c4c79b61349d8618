"""Context features of training sequences: computed as they are needed, or cached in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dflash_plugin.drafter.blockwise import KnownText
from dflash_plugin.errors import DFlashError
from dflash_plugin.train.sequences import Batch, SequenceSet, collate

SHARD_SEQUENCES = 1024


class FeatureSource(Protocol):
    """Gives the target's hidden states for a batch."""

    def __call__(self, batch: Batch) -> Tensor:
        """Features [B, S, n * hidden] of ``batch``, on its device."""


class OnlineFeatures:
    """Runs the target for every batch."""

    def __init__(self, target: PreTrainedModel, layer_ids: tuple[int, ...]) -> None:
        self.target = target
        self.layer_ids = layer_ids

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """One causal pass; padding stands behind the tokens, where nothing sees it."""
        out = self.target(
            input_ids=batch.tokens, use_cache=False, output_hidden_states=True, logits_to_keep=1
        )
        return torch.cat([out.hidden_states[i + 1] for i in self.layer_ids], dim=-1)


def known_texts(
    features: FeatureSource, sequences: SequenceSet, device: torch.device
) -> Iterator[KnownText]:
    """Every sequence with its features, on ``device``; its first anchor starts the response."""
    for index in range(len(sequences)):
        batch = collate(sequences, torch.tensor([index])).to(device)
        yield KnownText(batch.tokens[0], features(batch)[0], int(batch.prompt_lengths))


class CachedFeatures:
    """Reads features from the shards that ``cache_features`` wrote."""

    def __init__(self, directory: Path, sequences: SequenceSet, layer_ids: tuple[int, ...]) -> None:
        self.directory = directory
        index = directory / "index.json"
        expected = {"fingerprint": sequences.fingerprint(), "layer_ids": list(layer_ids)}
        found = json.loads(index.read_text()) if index.is_file() else None
        if found != expected:
            raise DFlashError(
                f"{str(directory)!r} holds no features of these sequences and layers (found "
                f"{found}, expected {expected}): remove it to have it made again"
            )

    def __call__(self, batch: Batch) -> Tensor:
        """Features of a batch, padded with zeros."""
        rows = []
        for index in batch.indices.tolist():
            shard = self.directory / f"features-{index // SHARD_SEQUENCES:05d}.safetensors"
            with safe_open(shard, framework="pt") as file:
                rows.append(file.get_tensor(str(index)))
        padded: Tensor = rows[0].new_zeros(len(rows), batch.tokens.shape[1], rows[0].shape[-1])
        for row, features in enumerate(rows):
            padded[row, : len(features)] = features
        return padded.to(batch.tokens.device)


def cache_features(
    directory: Path,
    sequences: SequenceSet,
    source: OnlineFeatures,
    device: torch.device,
    batch_size: int = 16,
) -> CachedFeatures:
    """Compute all features once and keep them as safetensors shards, one tensor a sequence.

    A finished cache of the same sequences and layers is used as it is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    index = directory / "index.json"
    if not index.is_file():
        for first in range(0, len(sequences), SHARD_SEQUENCES):
            shard: dict[str, Tensor] = {}
            members = torch.arange(first, min(first + SHARD_SEQUENCES, len(sequences)))
            for group in members.split(batch_size):
                batch = collate(sequences, group).to(device)
                features = source(batch).cpu()
                for row, sequence in enumerate(group.tolist()):
                    shard[str(sequence)] = features[row, : int(batch.lengths[row])].clone()
            save_file(shard, directory / f"features-{first // SHARD_SEQUENCES:05d}.safetensors")
        index.write_text(
            json.dumps(
                {"fingerprint": sequences.fingerprint(), "layer_ids": list(source.layer_ids)}
            )
        )
    return CachedFeatures(directory, sequences, source.layer_ids)
