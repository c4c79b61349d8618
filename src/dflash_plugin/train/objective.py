"""One training pass: all blocks of a batch through the drafter, and their loss."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dflash_plugin.drafter.blockwise import (
    BlockAttention,
    Blocks,
    accepted_run,
    block_hidden,
)
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.train.losses import dpace_weights, exponential_weights

Weighting = Literal["exponential", "dpace"]
LOGIT_ROWS = 16384


class Outcome(NamedTuple):
    """Loss (scalar, with gradient) and counts of one pass (without).

    Attributes:
        loss: weighted cross-entropy, a selector's added.
        runs: int64 [B, A], leading drafts that equal the target's tokens; 0 where not valid.
        correct, counted: float [K], right drafts and drafts with a label at each position.
    """

    loss: Tensor
    runs: Tensor
    correct: Tensor
    counted: Tensor


class Objective(nn.Module):
    """Drafter and loss as one module, so that data-parallel training can wrap it.

    A selector's loss is the cross-entropy of its scores with the true token before each position;
    ``selector_weight`` is its weight beside the head's. Its gradient goes through the logits into
    the whole drafter. ``attention`` is that of ``block_hidden``.
    """

    def __init__(
        self,
        drafter: Drafter,
        weighting: Weighting,
        gamma: float,
        dpace_alpha: float,
        selector_weight: float = 1.0,
        attention: BlockAttention = "dense",
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self.weighting = weighting
        self.gamma = gamma
        self.dpace_alpha = dpace_alpha
        self.selector_weight = selector_weight
        self.attention = attention

    def forward(self, features: Tensor, blocks: Blocks) -> Outcome:
        """Loss of the blocks [B, A] over context features [B, S, n * hidden]."""
        hidden = block_hidden(self.drafter, features, blocks, self.attention)
        labels = self._draft_labels(blocks.labels)
        before = torch.cat([blocks.tokens[..., :1], blocks.labels[..., :-1]], dim=-1)
        rows = (
            part.split(LOGIT_ROWS)
            for part in (hidden.flatten(0, 2), labels.flatten(), before.flatten())
        )
        parts = [self._predict(*some) for some in zip(*rows, strict=True)]
        cross_entropy, choice, hits = (
            torch.cat(part).view(labels.shape) for part in zip(*parts, strict=True)
        )
        # A label outside a reduced draft vocabulary can never be drafted: it carries no loss.
        counted = blocks.label_valid & (labels >= 0)
        # As every token before a run's end is right, this is the run of the path that is walked.
        correct = hits & counted
        loss = self._weighted(cross_entropy, counted)
        if self.drafter.candidate_selector is not None:
            loss = loss + self.selector_weight * self._weighted(choice, counted)
        return Outcome(
            loss,
            accepted_run(correct),
            correct.float().sum(dim=(0, 1)),
            blocks.label_valid.float().sum(dim=(0, 1)),
        )

    def _weighted(self, cross_entropy: Tensor, counted: Tensor) -> Tensor:
        """Mean of cross-entropies [B, A, K] by position; infinite ones count as no loss."""
        if self.weighting == "dpace":
            weights = dpace_weights(cross_entropy, counted, self.dpace_alpha)
            normalizer = counted[..., 0].sum().clamp(min=1)
        else:
            weights = exponential_weights(counted.shape[-1], self.gamma, counted.device) * counted
            normalizer = weights.sum().clamp(min=1e-6)
        return (cross_entropy.masked_fill(cross_entropy.isinf(), 0.0) * weights).sum() / normalizer

    def _predict(
        self, hidden: Tensor, labels: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of hidden states [N, H], and whether what they draft is right.

        A token that is no candidate cannot be drafted whatever the scores are, so the selector
        learns nothing from it: it would only learn to lift tokens that it never sees in use.

        Returns:
            The head's cross-entropy [N]; the selector's [N], infinite where the label is no
            candidate; bool [N].
        """
        selector = self.drafter.candidate_selector
        cross_entropy, logits, candidates = self._cross_entropy(hidden, labels)
        is_label = candidates == labels[:, None]
        if selector is None:
            return cross_entropy, cross_entropy, is_label[:, 0]
        with torch.autocast(hidden.device.type, enabled=False):
            scores = selector.scores(candidates, logits, hidden.float(), before)
        choice = -(F.log_softmax(scores, dim=-1) * is_label).sum(dim=-1)
        hit = is_label.gather(-1, scores.argmax(dim=-1, keepdim=True))[:, 0]
        return cross_entropy, choice.masked_fill(~is_label.any(dim=-1), torch.inf), hit

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy [N], and logits and draft ids [N, C] of the likeliest, best first."""
        selector = self.drafter.candidate_selector
        count = 1 if selector is None else selector.top_k
        weight = self.drafter.plain_head()
        if weight is not None and not weight.requires_grad:
            dtype = (
                torch.bfloat16 if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
            )
            frozen: tuple[Tensor, Tensor, Tensor] = _FrozenHeadCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden.to(dtype), weight.to(dtype), labels.clamp(min=0), count
            )
            return frozen
        trained: tuple[Tensor, Tensor, Tensor] = checkpoint(
            self._head_cross_entropy, hidden, labels, count, use_reentrant=False
        )
        return trained

    def _head_cross_entropy(
        self, hidden: Tensor, labels: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.drafter.logits(hidden).float()
        loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        return loss, *_likeliest(logits, count)

    def _draft_labels(self, labels: Tensor) -> Tensor:
        """Labels as draft-vocabulary ids; -1 where the draft vocabulary lacks the token."""
        d2t = self.drafter.d2t
        if d2t is None:
            return labels
        ids = torch.arange(len(d2t), device=labels.device)
        inverse = labels.new_full((self.drafter.config.vocab_size,), -1)
        inverse[ids + d2t] = ids
        return inverse[labels]


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits and ids [N, count] of the largest logits [N, V], best first."""
    # A maximum takes one pass over the vocabulary, topk several.
    best = logits.max(dim=-1, keepdim=True) if count == 1 else logits.topk(count, dim=-1)
    return best.values, best.indices


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy and candidates behind a head that is not trained.

    A row's cross-entropy moves its hidden state along one direction, whatever its weight in the
    loss turns out to be. The forward pass makes that direction from the logits that it has, so they
    are neither kept nor made again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ weight.t()
        values, candidates = _likeliest(logits, count)
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        del logits
        loss = -log_probs.gather(-1, labels[:, None])[:, 0]
        if ctx.needs_input_grad[0]:
            slope = log_probs.exp_()
            slope.scatter_add_(-1, labels[:, None], -torch.ones_like(slope[:, :1]))
            ctx.save_for_backward(slope.to(hidden.dtype) @ weight, weight, candidates)
        ctx.mark_non_differentiable(candidates)
        ctx.set_materialize_grads(False)
        return loss, values, candidates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        direction, weight, candidates = ctx.saved_tensors
        of_loss, of_values, _ = grads
        total = torch.zeros_like(direction)
        if of_loss is not None:
            total = direction * of_loss[:, None].to(direction.dtype)
        if of_values is not None:
            total += F.embedding_bag(
                candidates, weight, mode="sum", per_sample_weights=of_values.to(weight.dtype)
            )
        return total, None, None, None
