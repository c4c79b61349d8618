"""A checkpoint's known answers, drafted again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts, first_values
from dflash_plugin.doctor.acceptance import block_hidden, blocks_of, chosen
from dflash_plugin.doctor.texts import Texts
from dflash_plugin.drafter.blockwise import Blocks
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.serving.reference_check import FLOAT32, HALF
from dflash_plugin.train.sequences import SequenceSet

# By how much a recorded value may be off in float32, besides this share of itself.
RECORD_TOLERANCE = 1e-2


def close(found: list[float], recorded: list[float]) -> bool:
    """Whether values are the recorded ones but for rounding."""
    return all(
        abs(a - b) <= RECORD_TOLERANCE * (1 + abs(b)) for a, b in zip(found, recorded, strict=True)
    )


class KnownBlocks:
    """A checkpoint's known answers, as texts of one block each.

    Args:
        texts: the record's prompts with anchor and drafts behind them.
        record: what the float32 core drafted.
    """

    def __init__(self, texts: Texts, record: ReferenceDrafts) -> None:
        self.texts = texts
        self.record = record
        dtype = texts.target.dtype
        self.is_float32 = dtype == torch.float32
        self.min_margin, self.share = FLOAT32 if self.is_float32 else HALF

    @classmethod
    def of(cls, target: PreTrainedModel, record: ReferenceDrafts) -> KnownBlocks:
        """The record's prompts, read by a target."""
        pairs = [(a.prompt, [a.anchor, *a.drafts]) for a in record.answers]
        return cls(Texts(target, SequenceSet.build(pairs)), record)

    def blocks(self, drafter: Drafter) -> Blocks:
        """One block an answer."""
        anchors = self.texts.batch.prompt_lengths[:, None]
        return blocks_of(drafter, self.texts, anchors, torch.ones_like(anchors, dtype=torch.bool))

    @torch.inference_mode()
    def agreement(self, drafter: Drafter, among: Tensor | None = None) -> Agreement:
        """Draft the recorded blocks; one that is shorter than the record's lacks some.

        Args:
            drafter: bound to the target.
            among: as in ``measure``.
        """
        blocks = self.blocks(drafter)
        hidden = block_hidden(drafter, self.texts, blocks)[:, 0]
        drafts = chosen(drafter, hidden, blocks.tokens[:, 0, 0], among).tokens
        margins = torch.tensor([a.margins for a in self.record.answers], device=drafts.device)
        decided = margins >= self.min_margin
        count = min(drafts.shape[1], margins.shape[1])
        right = (drafts == blocks.labels[:, 0])[:, :count]
        if drafter.candidate_selector is not None:
            # What a selector drafts behind a difference follows from it, and says nothing.
            decided[:, 1:count] &= right.long().cumprod(dim=1).bool()[:, : count - 1]
        right &= decided[:, :count]
        exact = not self.is_float32 or self._exact(hidden)
        return Agreement(int(right.sum()), int(decided.sum()), self.share, exact)

    def _exact(self, hidden: Tensor) -> bool:
        """Whether the recorded values of hidden states [B, K, hidden] are there again."""
        answers = self.record.answers
        # In a longer or shorter block the last row is another one.
        rows = (0, -1) if hidden.shape[1] == len(answers[0].drafts) else (0,)
        return all(
            close(first_values(hidden[number, row]), answer.hidden[row])
            for number, answer in enumerate(answers)
            for row in rows
        )


class Agreement(NamedTuple):
    """A run against the known answers.

    Attributes:
        right, compared: drafts that agree, of those that were no near tie.
        share: that has to agree.
        exact: whether hidden values agree too; they are compared in float32 alone.
    """

    right: int
    compared: int
    share: float
    exact: bool

    @property
    def whole(self) -> bool:
        """Whether these are the known answers."""
        return self.exact and self.right >= self.share * self.compared
