"""A decode step of our worker, and the head that drafts at the end of a captured draft pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dflash_plugin.decoding.sampling import SamplingTensors
from dflash_plugin.serving.draft_tokens import Candidates
from dflash_plugin.sglang import penalties
from dflash_plugin.sglang.draft_estimate import Lesson
from dflash_plugin.sglang.protocols import ScheduleBatchLike
from dflash_plugin.sglang.short_blocks import ShortBlocks


@dataclass
class Step:
    """One decode pass of a batch.

    Attributes:
        batch: of B requests.
        anchors: int64 [B], positions of the anchors in their texts.
        params: how the requests sample, or None where all are greedy.
        seeded: bool [B], requests that gave a seed; None where all are greedy.
        draft_probs: float32 [B, K, V], the distributions that the drafts were drawn from, or
            [B, K, C] of candidates; None where the likeliest drafts were chosen.
        draft_candidates: int64 [B, K, C], the tokens that ``draft_probs`` are of; None where they
            are of the whole vocabulary.
        lesson: what the estimate of acceptance learns from; None where the pass teaches nothing.
        penalties: of the requests, or None where they have none.
        has_embedding: SGLang's worker has taken what it embeds the blocks with.
    """

    batch: ScheduleBatchLike
    anchors: Tensor
    params: SamplingTensors | None = None
    seeded: Tensor | None = None
    draft_probs: Tensor | None = None
    draft_candidates: Tensor | None = None
    lesson: Lesson | None = None
    penalties: penalties.Penalties | None = None
    has_embedding: bool = False


class Drafting(NamedTuple):
    """The output of a draft pass, from which drafts are chosen or drawn.

    Attributes:
        hidden: [B * K, hidden], the rows that draft.
        anchors: int64 [B], token ids of the blocks' anchors.
        candidates: the likeliest tokens of each row; None where the drafter has no selector.
    """

    hidden: Tensor
    anchors: Tensor
    candidates: Candidates | None

    def first(self, batch: int, drafts: int) -> Drafting:
        """Drop the requests that pad a batch.

        Args:
            batch: requests that are kept, the first ones.
            drafts: K, drafts of each request.
        """
        rows, found = batch * drafts, self.candidates
        if found is not None:
            found = found.first(rows)
        return Drafting(self.hidden[:rows], self.anchors[:batch], found)


class DraftingWorker(Protocol):
    """Our worker, as far as ``DraftGraphHead`` uses it."""

    step: Step | None
    device: Any

    @property
    def num_drafts(self) -> int:
        """Drafts of a whole block."""
        ...

    @property
    def draft_len(self) -> int:
        """Rows of a block, the anchor included, in the draft pass that runs."""
        ...

    @property
    def short_blocks(self) -> ShortBlocks | None:
        """What runs the draft pass, where it drafts shorter blocks."""
        ...

    @property
    def skips_draft(self) -> bool:
        """Whether the pass that runs verifies no draft."""
        ...

    def drafting_rows(self, hidden: Tensor) -> Tensor:
        """The rows that draft, of all rows of the blocks."""
        ...

    def drafting(self, hidden: Tensor, anchors: Tensor) -> Drafting:
        """Prepare to make drafts."""
        ...

    def draws_drafts(self, step: Step) -> bool:
        """Whether the drafts of a step are drawn from a distribution instead of chosen."""
        ...

    def choose_drafts(self, drafting: Drafting) -> Tensor:
        """The likeliest drafts."""
        ...

    def draw_drafts(self, drafting: Drafting, step: Step) -> Tensor:
        """Draw drafts from the drafter's distribution."""
        ...


class DraftGraphHead:
    """Makes drafts at the end of the captured draft pass.

    SGLang calls the object while it captures a draft pass, and reads ``out`` after each replay.

    Args:
        worker: the worker whose drafter's head runs.
        max_batch: largest number of requests in a captured batch.
    """

    def __init__(self, worker: DraftingWorker, max_batch: int) -> None:
        self.worker = worker
        rows = max_batch * worker.num_drafts
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=worker.device)
        self.captured: dict[tuple[int, int], Drafting] = {}

    def __call__(self, hidden: Tensor, input_ids: Tensor) -> None:
        """Capture the head.

        Args:
            hidden: [B * block, hidden], the output of the draft pass.
            input_ids: int64 [B * block], tokens of the blocks.
        """
        rows = self.worker.drafting_rows(hidden)
        anchors = input_ids[: len(hidden)].view(-1, self.worker.draft_len)[:, 0]
        drafting = self.worker.drafting(rows, anchors)
        self.captured[self.worker.draft_len, len(anchors)] = drafting
        self.tokens[: rows.shape[0]].copy_(self.worker.choose_drafts(drafting))

    @property
    def out(self) -> Tensor:
        """Drafts of the pass that was just replayed, int64 [at least B * K].

        A property because SGLang reads ``.out``. For a batch that samples, reading it launches the
        kernels that draw the drafts, and sets ``step.draft_probs``.
        """
        step, short = self.worker.step, self.worker.short_blocks
        if step is None or self.worker.skips_draft:
            return self.tokens
        size, made = len(step.batch.reqs), self.tokens
        if self.worker.draws_drafts(step):
            rows = self.worker.draft_len
            captured = min(key for key in self.captured if key[0] == rows and key[1] >= size)
            drafting = self.captured[captured].first(size, rows - 1)
            made = self.worker.draw_drafts(drafting, step)
        return made if short is None else short.whole_drafts(made, size)
