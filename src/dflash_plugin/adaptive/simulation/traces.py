"""What a drafter would draft at every position of texts: how sure it is, and how far it is right.

Greedy text does not depend on how much of a block is verified, so that one recording serves every
policy: a step at a position commits the drafts that are right and verified, and one token more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_plugin.drafter.blockwise import KnownText, accepted_run, block_starts, blocks_of_texts
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError, reason


@dataclass(frozen=True, eq=False)
class Traces:
    """Recorded texts behind each other.

    Attributes:
        confidence: float16 [N, K], of the block at each position.
        right: int64 [N], leading drafts that equal the text.
        starts: int64 [R + 1], where each text begins, and the end.
    """

    confidence: Tensor
    right: Tensor
    starts: Tensor

    @property
    def num_drafts(self) -> int:
        """Drafts of a block."""
        return self.confidence.shape[1]

    @property
    def tau(self) -> float:
        """Tokens a step when all drafts are verified, over all texts."""
        passes = sum(self.passes())
        return len(self.right) / passes if passes else 0.0

    def passes(self) -> list[int]:
        """Of each text, when all drafts are verified."""
        ends = zip(self.starts.tolist(), self.starts[1:].tolist(), strict=False)
        return [sum(1 for _ in block_starts(self.right[start:end].tolist())) for start, end in ends]

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "confidence": self.confidence.half(),
            "right": self.right.to(torch.int16),
            "starts": self.starts.to(torch.int32),
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Traces:
        """Read what ``save`` wrote.

        Raises:
            DFlashError: the file is missing or holds no traces.
        """
        try:
            tensors = load_file(path)
            found = cls(tensors["confidence"], tensors["right"].long(), tensors["starts"].long())
        except (OSError, SafetensorError, KeyError) as error:
            raise DFlashError(
                f"{path} holds no traces ({reason(error)}): record some with tools/record_traces.py"
            ) from error
        whole = found.starts.numel() > 1 and int(found.starts[-1]) == len(found.right)
        if not whole or found.confidence.shape[:1] != found.right.shape:
            raise DFlashError(
                f"{path} is not whole: {list(found.confidence.shape)} confidences, "
                f"{len(found.right)} outcomes; record it again"
            )
        return found


@torch.no_grad()
def record(drafter: Drafter, texts: Iterable[KnownText]) -> Traces:
    """Draft at every position of every text from its first anchor on.

    Args:
        drafter: bound to its target.
        texts: greedy text of the target.
    """
    confidences, rights, starts = [], [], [0]
    for passes in blocks_of_texts(drafter, texts):
        for blocks, hidden in passes:
            proposal = drafter.propose(hidden, blocks.tokens[0, :, 0], blocks.anchors[0])
            correct = (proposal.tokens == blocks.labels[0]) & blocks.label_valid[0]
            confidences.append(proposal.confidence.half().cpu())
            rights.append(accepted_run(correct).cpu())
        starts.append(starts[-1] + sum(len(hidden) for _, hidden in passes))
    return Traces(torch.cat(confidences), torch.cat(rights), torch.tensor(starts))
