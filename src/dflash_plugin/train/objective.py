"""One training pass: all blocks of a batch through the drafter, and their loss."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dflash_plugin.attention import masked_attention
from dflash_plugin.config import LayerAttention
from dflash_plugin.drafter import Drafter
from dflash_plugin.train.blocks import Blocks, training_mask
from dflash_plugin.train.losses import accepted_run, dpace_weights, exponential_weights

Weighting = Literal["exponential", "dpace"]
LOGIT_ROWS = 16384


class Outcome(NamedTuple):
    """Loss (scalar, with gradient) and counts of one pass (without).

    Attributes:
        loss: weighted cross-entropy.
        runs: int64 [B, A], leading drafts that equal the target's tokens; 0 where not valid.
        correct, counted: float [K], right drafts and drafts with a label at each position.
    """

    loss: Tensor
    runs: Tensor
    correct: Tensor
    counted: Tensor


class Objective(nn.Module):
    """Drafter and loss as one module, so that data-parallel training can wrap it."""

    def __init__(
        self, drafter: Drafter, weighting: Weighting, gamma: float, dpace_alpha: float
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self.weighting = weighting
        self.gamma = gamma
        self.dpace_alpha = dpace_alpha

    def forward(self, features: Tensor, blocks: Blocks) -> Outcome:
        """Loss of the blocks [B, A] over context features [B, S, n * hidden]."""
        hidden = self.block_hidden(features, blocks)
        flat = hidden.flatten(0, 2)
        labels = self._draft_labels(blocks.labels)
        losses, hits = [], []
        for rows, targets in zip(
            flat.split(LOGIT_ROWS), labels.flatten().split(LOGIT_ROWS), strict=True
        ):
            loss, hit = self._cross_entropy(rows, targets)
            losses.append(loss)
            hits.append(hit)
        cross_entropy = torch.cat(losses).view(blocks.labels.shape)
        # A label outside a reduced draft vocabulary can never be drafted: it carries no loss.
        counted = blocks.label_valid & (labels >= 0)
        correct = torch.cat(hits).view(blocks.labels.shape) & counted
        if self.weighting == "dpace":
            weights = dpace_weights(cross_entropy, counted, self.dpace_alpha)
            normaliser = counted[..., 0].sum().clamp(min=1)
        else:
            decay = exponential_weights(labels.shape[-1], self.gamma, labels.device)
            weights = decay * counted
            normaliser = weights.sum().clamp(min=1e-6)
        loss = (cross_entropy * weights).sum() / normaliser
        return Outcome(
            loss,
            accepted_run(correct),
            correct.float().sum(dim=(0, 1)),
            blocks.label_valid.float().sum(dim=(0, 1)),
        )

    def block_hidden(self, features: Tensor, blocks: Blocks) -> Tensor:
        """Hidden states [B, A, K, hidden] of the rows that predict, for every anchor's block."""
        drafter, config = self.drafter, self.drafter.config
        batch, context = features.shape[:2]
        count, size = blocks.anchors.shape[1], config.block_size
        places = torch.arange(context, device=features.device).expand(batch, -1)
        stored = list(drafter.context_keys_values(drafter.fuse(features), places))
        masks: dict[LayerAttention, Tensor] = {
            layer: training_mask(layer, config.window_from, blocks.anchors, size, context)
            for layer in set(config.layers)
        }

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys = torch.cat([stored[index][0].to(key.dtype), key], dim=1)
            values = torch.cat([stored[index][1].to(value.dtype), value], dim=1)
            out = masked_attention(
                query.transpose(1, 2),
                keys.transpose(1, 2).to(query.dtype),
                values.transpose(1, 2).to(query.dtype),
                masks[config.layers[index]],
                config.head_dim**-0.5,
                drafter.sinks(index),
            )
            return out.transpose(1, 2)

        positions = blocks.anchors[..., None] + torch.arange(size, device=features.device)
        hidden = drafter.run_block(
            drafter.embed(blocks.tokens.flatten(1)), positions.flatten(1), attend
        )
        return hidden.view(batch, count, size, -1)[:, :, size - config.num_draft_tokens :]

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy [N] and whether the top draft is right, bool [N], of hidden [N, H]."""
        weight = self.drafter.plain_head()
        if weight is not None and not weight.requires_grad:
            dtype = (
                torch.bfloat16 if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
            )
            loss, top = _FrozenHeadCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden.to(dtype), weight.to(dtype), labels.clamp(min=0)
            )
            return loss, top == labels
        loss, top = checkpoint(self._head_cross_entropy, hidden, labels, use_reentrant=False)
        return loss, top == labels

    def _head_cross_entropy(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.drafter.logits(hidden).float()
        loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        return loss, logits.argmax(dim=-1)

    def _draft_labels(self, labels: Tensor) -> Tensor:
        """Labels as draft-vocabulary ids; -1 where the draft vocabulary lacks the token."""
        d2t = self.drafter.d2t
        if d2t is None:
            return labels
        ids = torch.arange(len(d2t), device=labels.device)
        inverse = labels.new_full((self.drafter.config.vocab_size,), -1)
        inverse[ids + d2t] = ids
        return inverse[labels]


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy behind a head that is not trained; logits are made twice and never kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.t()
        top = logits.argmax(dim=-1)
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, labels)
        ctx.mark_non_differentiable(top)
        return -log_probs.gather(-1, labels[:, None])[:, 0], top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        slope = torch.softmax(hidden @ weight.t(), dim=-1)
        slope.scatter_add_(-1, labels[:, None], -torch.ones_like(slope[:, :1]))
        return (slope * grads[0][:, None].to(slope.dtype)) @ weight, None, None
