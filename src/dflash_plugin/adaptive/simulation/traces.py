"""What a drafter would draft at every position of texts: how sure it is, and how far it is right.

Greedy text does not depend on how much of a block is verified, so that one recording serves every
policy: a step at a position commits the drafts that are right and verified, and one token more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.train.blocks import Blocks, choose_anchors, make_blocks
from dflash_plugin.train.features import FeatureSource
from dflash_plugin.train.losses import accepted_run, walk
from dflash_plugin.train.objective import Objective
from dflash_plugin.train.sequences import SequenceSet, collate

# Blocks of one pass.
BLOCKS = 64


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
        return [sum(1 for _ in walk(self.right[start:end].tolist())) for start, end in ends]

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


def drafted(
    drafter: Drafter, features: FeatureSource, sequences: SequenceSet
) -> Iterator[list[tuple[Blocks, Tensor]]]:
    """Of each text, the blocks at every position of its response, in parts that fit one pass.

    Args:
        drafter: bound to its target.
        features: of the target.
        sequences: prompts and responses.

    Yields:
        Blocks [1, A] and the hidden states [A, K, hidden] of the rows that predict.
    """
    objective = Objective(drafter, "exponential", 1.0, 0.0)
    device = drafter.norm.weight.device
    for index in range(len(sequences)):
        batch = collate(sequences, torch.tensor([index])).to(device)
        context = features(batch).to(drafter.norm.weight.dtype)
        anchors, valid = choose_anchors(batch, batch.longest_response, None)
        parts = []
        for part in anchors[:, valid[0]].split(BLOCKS, dim=1):
            here = torch.ones_like(part, dtype=torch.bool)
            blocks = make_blocks(batch.tokens, batch.lengths, part, here, drafter.config)
            parts.append((blocks, objective.block_hidden(context, blocks)[0]))
        yield parts


@torch.no_grad()
def record(drafter: Drafter, features: FeatureSource, sequences: SequenceSet) -> Traces:
    """Draft at every position of every response.

    Args:
        drafter: bound to its target.
        features: of the target.
        sequences: prompts and greedy responses.
    """
    confidences, rights, starts = [], [], [0]
    for parts in drafted(drafter, features, sequences):
        for blocks, hidden in parts:
            proposal = drafter.propose(hidden, blocks.tokens[0, :, 0], blocks.anchors[0])
            stands = (proposal.tokens == blocks.labels[0]) & blocks.label_valid[0]
            confidences.append(proposal.confidence.half().cpu())
            rights.append(accepted_run(stands).cpu())
        starts.append(starts[-1] + sum(len(hidden) for _, hidden in parts))
    return Traces(torch.cat(confidences), torch.cat(rights), torch.tensor(starts))
