"""Which drafts equal a known text, at some of its positions.

A block is drafted at every few positions of a greedy text, in one pass: no text is generated, so
that another setting costs one pass of the drafter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts, first_values
from dflash_plugin.decoding.acceptance import rates
from dflash_plugin.doctor.texts import Texts
from dflash_plugin.drafter import blockwise
from dflash_plugin.drafter.blockwise import Blocks, accepted_run, block_starts, make_blocks
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.layers import RMSNorm
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.rope import RotaryEmbedding
from dflash_plugin.serving.reference_check import FLOAT32, HALF
from dflash_plugin.train.blocks import choose_anchors
from dflash_plugin.train.sequences import SequenceSet

STRIDE = 4
# Blocks whose logits are computed at once.
BLOCKS = 32
# Labels that a block has before its text ends.
HORIZON = 8
# Positions of a text whose blocks count as one observation.
STRETCH = 16
# By how much a recorded value may be off in float32, besides this share of itself.
RECORD_TOLERANCE = 1e-2


def close(found: list[float], recorded: list[float]) -> bool:
    """Whether values are the recorded ones but for rounding."""
    return all(
        abs(a - b) <= RECORD_TOLERANCE * (1 + abs(b)) for a, b in zip(found, recorded, strict=True)
    )


@dataclass(frozen=True, eq=False)
class BlockAcceptance:
    """Which drafts of some blocks equal the text.

    Attributes:
        hits: bool [N, K], drafts that equal the text.
        room: int64 [N], tokens of the text behind each block's anchor.
        stretches: int64 [N], the stretch of a text that each block lies in.
    """

    hits: Tensor
    room: Tensor | None = None
    stretches: Tensor | None = None

    @property
    def runs(self) -> Tensor:
        """Leading drafts that equal the text, float [N]."""
        return accepted_run(self.hits).float()

    @property
    def tau(self) -> float:
        """Tokens committed per verify pass, bonus token included."""
        return 1 + self.runs.mean().item()

    @property
    def by_position(self) -> list[float]:
        """Share of blocks whose first k drafts all equal the text, k = 1..K."""
        counts = self.hits.long().cumprod(dim=1).sum(dim=0).tolist()
        return [round(rate, 3) for rate in rates(counts, len(self.hits))]


def with_config(drafter: Drafter, config: DrafterConfig) -> Drafter:
    """The drafter under other settings; its weights are shared.

    Args:
        drafter: bound to its target.
        config: as many layers, features and heads as the drafter's.
    """
    other = cast(Drafter, _shared_copy(drafter))
    other.config = config
    other.rotary = RotaryEmbedding(config).to(drafter.norm.weight.device)
    for module in other.modules():
        if isinstance(module, RMSNorm):
            module.gemma = config.norm_style == "gemma"
    return other


def _shared_copy(module: nn.Module) -> nn.Module:
    """A module and its submodules anew, with the same parameters."""
    other = copy.copy(module)
    other._modules = {
        name: None if child is None else _shared_copy(child)
        for name, child in module._modules.items()
    }
    return other


def shortened(drafter: Drafter, drafts: int) -> Drafter:
    """The drafter with blocks of so many drafts; its weights are shared."""
    config = drafter.config
    size = config.block_size - config.num_draft_tokens + drafts
    return with_config(drafter, config.model_copy(update={"block_size": size}))


def block_positions(texts: Texts, stride: int = STRIDE) -> tuple[Tensor, Tensor]:
    """Anchors int64 [B, A] at every ``stride``-th position of the responses, and the valid ones."""
    batch = texts.batch
    room = batch.lengths - batch.prompt_lengths - 1
    needed = min(HORIZON, int(room.max()))
    offsets = torch.arange(0, max(1, int(room.max())), stride, device=room.device)
    valid = offsets[None] <= (room - needed)[:, None]
    return batch.prompt_lengths[:, None] + torch.where(valid, offsets, 0), valid


def blocks_of(drafter: Drafter, texts: Texts, anchors: Tensor, valid: Tensor) -> Blocks:
    """The blocks of ``texts`` at ``anchors``."""
    batch = texts.batch
    return make_blocks(batch.tokens, batch.lengths, anchors, valid, drafter.config)


def block_hidden(drafter: Drafter, texts: Texts, blocks: Blocks) -> Tensor:
    """Hidden states [B, A, K, hidden] of the rows that predict."""
    features = texts.features(drafter.config.target_layer_ids).to(drafter.norm.weight.dtype)
    return blockwise.block_hidden(drafter, features, blocks)


@torch.inference_mode()
def measure(
    drafter: Drafter, texts: Texts, stride: int = STRIDE, among: Tensor | None = None
) -> BlockAcceptance:
    """Draft at every ``stride``-th position of the responses.

    Args:
        drafter: bound to the target of ``texts``.
        texts: greedy ones.
        stride: positions between two blocks.
        among: token ids int64 [M] that drafts are chosen among, which spares a large head; all when
            None or where the head is not a plain one.
    """
    anchors, valid = block_positions(texts, stride)
    blocks = blocks_of(drafter, texts, anchors, valid)
    hidden = block_hidden(drafter, texts, blocks)
    drafts = chosen(drafter, hidden, blocks.tokens[..., 0], among)
    hits = (drafts == blocks.labels) & blocks.label_valid
    room = texts.batch.lengths[:, None] - 1 - anchors
    rows = torch.arange(len(anchors), device=anchors.device)[:, None]
    offsets = anchors - texts.batch.prompt_lengths[:, None]
    stretches = rows * anchors.shape[1] * stride + offsets // STRETCH
    return BlockAcceptance(hits[valid], room[valid], stretches[valid])


@torch.inference_mode()
def decoded_tau(drafter: Drafter, texts: Texts) -> float:
    """τ of decoding these texts pass by pass, as an engine does: a block begins where one ended.

    Args:
        drafter: bound to the target of ``texts``.
        texts: greedy ones.
    """
    every, valid = choose_anchors(texts.batch, texts.batch.longest_response, None)
    runs = []
    for part in zip(every.split(BLOCKS, dim=1), valid.split(BLOCKS, dim=1), strict=True):
        blocks = blocks_of(drafter, texts, *part)
        drafts = chosen(drafter, block_hidden(drafter, texts, blocks), blocks.tokens[..., 0], None)
        runs.append(accepted_run((drafts == blocks.labels) & blocks.label_valid))
    counts: list[int] = valid.sum(dim=1).tolist()
    rows = zip(torch.cat(runs, dim=1).tolist(), counts, strict=True)
    return sum(counts) / sum(1 for row, count in rows for _ in block_starts(row[:count]))


def chosen(drafter: Drafter, hidden: Tensor, anchors: Tensor, among: Tensor | None) -> Tensor:
    """Drafts int64 [..., K] of hidden states [..., K, hidden] behind anchors int64 [...].

    Args:
        drafter, among: see ``measure``.
        hidden: of the rows that predict.
        anchors: tokens, which a selector's walk begins with.
    """
    rows, first = hidden.flatten(0, -3), anchors.flatten()
    weight, selector = drafter.plain_head(), drafter.candidate_selector
    if among is None or weight is None or drafter.d2t is not None:
        parts = zip(rows.split(BLOCKS), first.split(BLOCKS), strict=True)
        # Positions key the noise of draws, and nothing is drawn.
        drafts = torch.cat([drafter.propose(some, at, at).tokens for some, at in parts])
    else:
        logits = F.linear(rows, weight[among])
        if selector is None:
            drafts = among[logits.argmax(dim=-1)]
        else:
            best = logits.topk(min(selector.top_k, len(among)), dim=-1)
            drafts = selector(among[best.indices], best.values, rows, first).tokens
    return drafts.view(hidden.shape[:-1])


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
        drafts = chosen(drafter, hidden, blocks.tokens[:, 0, 0], among)
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
