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

from dflash_plugin.decoding.acceptance import rates
from dflash_plugin.doctor.texts import Texts
from dflash_plugin.drafter import blockwise
from dflash_plugin.drafter.blockwise import Blocks, accepted_run, block_starts, make_blocks
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.layers import RMSNorm
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.rope import RotaryEmbedding
from dflash_plugin.train.blocks import choose_anchors

STRIDE = 4
# Blocks whose logits are computed at once.
BLOCKS = 32
# Labels that a block has before its text ends.
HORIZON = 8
# Positions of a text whose blocks count as one observation.
STRETCH = 16


@dataclass(frozen=True, eq=False)
class BlockAcceptance:
    """Which drafts of some blocks equal the text.

    Attributes:
        hits: bool [N, K], drafts that equal the text.
        room: int64 [N], tokens of the text behind each block's anchor.
        stretches: int64 [N], the stretch of a text that each block lies in.
        expected: float [N], leading drafts that would equal the text if they were drawn; None where
            the head does not give the probability of every token.
    """

    hits: Tensor
    room: Tensor | None = None
    stretches: Tensor | None = None
    expected: Tensor | None = None

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
    # Behind the last of these no text has a block.
    last = int(room.max()) - needed
    offsets = torch.arange(0, max(1, last + 1), stride, device=room.device)
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
    drafts, probs = chosen(drafter, hidden, blocks.tokens[..., 0], among, blocks.labels)
    hits = (drafts == blocks.labels) & blocks.label_valid
    if probs is not None:
        probs = (probs * blocks.label_valid).cumprod(dim=-1).sum(dim=-1)[valid]
    room = texts.batch.lengths[:, None] - 1 - anchors
    rows = torch.arange(len(anchors), device=anchors.device)[:, None]
    offsets = anchors - texts.batch.prompt_lengths[:, None]
    stretches = rows * anchors.shape[1] * stride + offsets // STRETCH
    return BlockAcceptance(hits[valid], room[valid], stretches[valid], probs)


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
        hidden = block_hidden(drafter, texts, blocks)
        drafts = chosen(drafter, hidden, blocks.tokens[..., 0], None).tokens
        runs.append(accepted_run((drafts == blocks.labels) & blocks.label_valid))
    counts: list[int] = valid.sum(dim=1).tolist()
    rows = zip(torch.cat(runs, dim=1).tolist(), counts, strict=True)
    return sum(counts) / sum(1 for row, count in rows for _ in block_starts(row[:count]))


class Chosen(NamedTuple):
    """Drafts of blocks.

    Attributes:
        tokens: int64 [..., K].
        probs: float [..., K], probabilities of the labels; None without labels, or where the head
            does not give them.
    """

    tokens: Tensor
    probs: Tensor | None


def chosen(
    drafter: Drafter,
    hidden: Tensor,
    anchors: Tensor,
    among: Tensor | None,
    labels: Tensor | None = None,
) -> Chosen:
    """Drafts of hidden states [..., K, hidden] behind anchors int64 [...].

    Args:
        drafter, among: see ``measure``; all labels are among these.
        hidden: of the rows that predict.
        anchors: tokens, which a selector's walk begins with.
        labels: int64 [..., K], whose probabilities are asked for.
    """
    rows, first = hidden.flatten(0, -3), anchors.flatten()
    weight, selector = drafter.plain_head(), drafter.candidate_selector
    weigh = labels is not None and selector is None and drafter.d2t is None
    wanted = labels.flatten(0, -2) if labels is not None and weigh else None
    if among is None or weight is None or drafter.d2t is not None:
        parts = zip(rows.split(BLOCKS), first.split(BLOCKS), strict=True)
        tokens, probs = [], []
        for number, (some, at) in enumerate(parts):
            # Positions key the noise of draws, and nothing is drawn.
            made = drafter.propose(some, at, at)
            tokens.append(made.tokens)
            if wanted is not None:
                part = wanted[number * BLOCKS : (number + 1) * BLOCKS]
                probs.append(probability(made.scores, part))
        drafts = torch.cat(tokens)
        weighed = torch.cat(probs) if probs else None
    else:
        logits = F.linear(rows, weight[among])
        weighed = None
        if wanted is not None:
            weighed = probability(logits, torch.searchsorted(among, wanted))
        if selector is None:
            drafts = among[logits.argmax(dim=-1)]
        else:
            best = logits.topk(min(selector.top_k, len(among)), dim=-1)
            drafts = selector(among[best.indices], best.values, rows, first).tokens
    shape = hidden.shape[:-1]
    return Chosen(drafts.view(shape), None if weighed is None else weighed.view(shape))


def probability(logits: Tensor, columns: Tensor) -> Tensor:
    """Probabilities float32 [...] of columns int64 [...] of logits [..., V]; 0 beyond them."""
    logits, size = logits.float(), logits.shape[-1]
    of_columns = logits.gather(-1, columns.clamp(max=size - 1)[..., None]).squeeze(-1)
    return (of_columns - logits.logsumexp(dim=-1)).exp() * (columns < size)
