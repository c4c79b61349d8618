"""Training sequences: prompts and the target's own responses, kept in safetensors shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dflash_plugin.errors import DFlashError


@dataclass(frozen=True)
class SequenceSet:
    """Tokenized prompts with responses, back to back.

    Attributes:
        tokens: int32 [sum of lengths].
        offsets: int64 [N + 1], where each sequence starts.
        prompt_lengths: int64 [N], tokens before the response.
    """

    tokens: Tensor
    offsets: Tensor
    prompt_lengths: Tensor

    @classmethod
    def build(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> SequenceSet:
        """From (prompt ids, response ids) pairs.

        Raises:
            DFlashError: there is no pair.
        """
        if not pairs:
            raise DFlashError("no training sequence: every response was empty; give more prompts")
        lengths = torch.tensor([len(p) + len(r) for p, r in pairs], dtype=torch.int64)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        flat = [token for prompt, response in pairs for token in (*prompt, *response)]
        return cls(
            torch.tensor(flat, dtype=torch.int32),
            offsets,
            torch.tensor([len(p) for p, _ in pairs], dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Tokens int32 [length] and prompt length of one sequence."""
        return (
            self.tokens[self.offsets[index] : self.offsets[index + 1]],
            int(self.prompt_lengths[index]),
        )

    @property
    def lengths(self) -> Tensor:
        """int64 [N], prompt and response together."""
        return self.offsets.diff()

    @property
    def num_response_tokens(self) -> int:
        """Tokens that the target wrote."""
        return int(self.offsets[-1] - self.prompt_lengths.sum())

    def select(self, indices: Tensor) -> SequenceSet:
        """The sequences at ``indices`` int64 [M]."""
        parts = [self[int(i)] for i in indices]
        lengths = torch.tensor([len(tokens) for tokens, _ in parts], dtype=torch.int64)
        return SequenceSet(
            torch.cat([tokens for tokens, _ in parts]),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            torch.tensor([prompt for _, prompt in parts], dtype=torch.int64),
        )

    def fingerprint(self) -> str:
        """SHA-256 of the content, by which a resumed run knows its data."""
        digest = hashlib.sha256()
        for tensor in (self.tokens, self.offsets, self.prompt_lengths):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path, origin: dict[str, Any]) -> None:
        """Write one safetensors file; ``origin`` says how the sequences were made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(
            {
                "tokens": self.tokens,
                "offsets": self.offsets,
                "prompt_lengths": self.prompt_lengths,
            },
            temporary,
            metadata={"origin": json.dumps(origin)},
        )
        temporary.rename(path)

    @classmethod
    def load(cls, path: Path) -> SequenceSet:
        """Read what ``save`` wrote.

        Raises:
            DFlashError: the file is missing or not such a file.
        """
        with _reading(path) as file:
            return cls(
                file.get_tensor("tokens"),
                file.get_tensor("offsets"),
                file.get_tensor("prompt_lengths"),
            )

    @staticmethod
    def origin(path: Path) -> dict[str, Any]:
        """What ``save`` was told about how the sequences were made.

        Raises:
            DFlashError: the file is not such a file.
        """
        with _reading(path) as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get("origin", "{}"))
            return found


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DFlashError(
            f"{str(path)!r} is not a file of training sequences ({error}): make one with "
            "`dflash-plugin train`, or remove it to have it made again"
        ) from error


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length.

    Attributes:
        tokens: int64 [B, S].
        lengths, prompt_lengths: int64 [B].
        indices: int64 [B], which sequences of the set these are.
        longest_response: tokens of the longest response, known without asking the device.
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    indices: Tensor
    longest_response: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.lengths.to(device, non_blocking=True),
            self.prompt_lengths.to(device, non_blocking=True),
            self.indices,
            self.longest_response,
        )


def collate(sequences: SequenceSet, indices: Tensor) -> Batch:
    """Pad the sequences at ``indices`` int64 [B] to the longest of them."""
    parts = [sequences[int(i)] for i in indices]
    lengths = torch.tensor([len(tokens) for tokens, _ in parts], dtype=torch.int64)
    padded = torch.zeros(len(parts), int(lengths.max()), dtype=torch.int64)
    for row, (tokens, _) in enumerate(parts):
        padded[row, : len(tokens)] = tokens
    prompts = torch.tensor([prompt for _, prompt in parts], dtype=torch.int64)
    return Batch(padded, lengths, prompts, indices, int((lengths - prompts).max()))


def batches(sequences: SequenceSet, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless shuffled batches of like length, the same for the same seed.

    Args:
        sequences: the training set.
        batch_size: sequences a batch; fewer when the set is smaller.
        seed: order of everything.
        start: batches to skip, when a run resumes.
    """
    number, epoch = 0, 0
    size = min(batch_size, len(sequences))
    while True:
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(sequences), generator=generator)
        # Sorting within a stretch of 32 batches keeps padding low and the order random.
        stretches = order.split(size * 32)
        ordered = torch.cat([s[sequences.lengths[s].argsort()] for s in stretches])
        groups = [group for group in ordered.split(size) if len(group) == size]
        for position in torch.randperm(len(groups), generator=generator).tolist():
            if number >= start:
                yield collate(sequences, groups[position])
            number += 1
        epoch += 1
