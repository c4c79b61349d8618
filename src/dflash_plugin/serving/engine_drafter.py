"""A drafter bound to an engine's target: weights, head and choice of draft tokens.

Each engine's draft model inherits ``EngineDrafterMixin`` and adds its attention and its paged
cache.

Sliding windows: ``LayerAttention.sliding_window`` is the number of positions W that a row sees,
itself included. It counts back from each row, or from the block's anchor for drafters with
``window_from="anchor"``, whose windows end one position further back. vLLM takes a window that
includes the row itself, so W or W + 1. SGLang takes one that leaves the row out, so W - 1 or W.
Each adapter has its own ``_window``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.drafter.layers import DraftLayer
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.target_embedding import stored_rows
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.fp8_rows import Fp8Rows, quantize
from dflash_plugin.kernels.vocab_topk import HeadChoice
from dflash_plugin.serving.draft_tokens import (
    Candidates,
    best_of_ranks,
    best_of_shard,
    candidates,
    first_token,
    shard_rows,
)
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.fp8_weights import (
    drop_stored_rows,
    fp8_obstacle,
    keep_stored_rows,
    plain_values,
    quantize_engine_drafter,
    quantized_head,
    round_into,
    stored_context_rows,
)
from dflash_plugin.serving.layers import QKVShard
from dflash_plugin.serving.quantised_linears import QuantisedLinears, dequantised_gib
from dflash_plugin.serving.weights import copy_tensors, fill


class EngineDrafterMixin:
    """What the engines' draft models do alike.

    Attributes:
        plain_linear: the engine's method of linears that are not quantized.
        plain_head: the engine's method of heads that are not quantized.
        logger: the engine's.
        spec: the drafter's checkpoint, configuration and options.
        drafter: on the engine's layers.
        vocab_size: of the target.
        gather: puts every rank's [T, n] side by side, [T, ranks * n]; None where there is one rank.
        context_weight: [layers * 2 * kv_heads * head_dim, hidden], makes the keys and values of
            ``context_rows`` of all layers in one product; None where a layer's weight is not plain,
            or its attention is latent.
        context_bias: goes with ``context_weight``, or None.
        quantised: the linears that the engine multiplies as the checkpoint stores them, or None.
        rank: tensor-parallel rank of this shard.
        target_changed: the target's weights may have changed since the last pass.
        source: the checkpoint whose weights were loaded last; None where none was.
        has_tensors: weights came as tensors since then.
    """

    plain_linear: ClassVar[type]
    plain_head: ClassVar[type]
    logger: ClassVar[logging.Logger] = logging.getLogger(__name__)
    spec: DrafterSpec
    drafter: Drafter
    vocab_size: int
    gather: Callable[[Tensor], Tensor] | None
    context_weight: Tensor | Fp8Rows | None = None
    context_bias: Tensor | None = None
    quantised: QuantisedLinears | None = None
    rank = 0
    target_changed = False
    source: Path | None = None
    has_tensors = False
    _rounds: bool | None = None
    _prepared = False
    # The target's head, in a tuple so that it is no module of ours.
    _borrowed: tuple[Any] | None = None

    def borrow(self, target: nn.Module, embedding: Any, head: Any) -> None:
        """Let the drafter use the target's embedding and head; with FP8, a copy of the head.

        Args:
            target: for the message.
            embedding: the target's, or None where it has none.
            head: the target's, or None where it has none.

        Raises:
            DFlashError: the target lacks one, or its width does not fit.
        """
        if embedding is None or head is None:
            raise DFlashError(
                f"{type(target).__name__} has no embedding or lm_head to lend to the drafter: use "
                "a decoder-only language model as the target"
            )
        drafter = self.drafter
        factor = self.spec.embedding_factor
        drafter.borrow(embedding.weight, head, stored_rows(embedding), factor)
        if not self._in_fp8:
            return
        self._borrowed = (head,)
        is_own = drafter.own_head is not None
        rounded = quantized_head(drafter.head(), self.plain_head, is_own)
        if is_own:
            drafter.own_head = rounded
        else:
            drafter.replace_borrowed_head(rounded)

    def follow_target(self) -> None:
        """Round the target's head again where its weights have changed in place."""
        if not self.target_changed:
            return
        self.target_changed = False
        if self._borrowed is None or self.drafter.own_head is not None:
            return
        head, rounded = self._borrowed[0], cast(Any, self.drafter.head())
        if rounded is not head:
            round_into(rounded, head.weight.detach())

    def load_whole_checkpoint(self) -> None:
        """Fill the parameters from the checkpoint, each by its own loader.

        Raises:
            DFlashError: the checkpoint is malformed or maps tokens that the target lacks.
        """
        fill(self.drafter, self.spec, self.rank, self.quantised)
        self.source = self.spec.checkpoint

    def prepare_weights(self) -> None:
        """Stack what makes context keys and values of all layers, and round weights to FP8.

        Call it when the weights are loaded and before a platform packs them. A second call does
        nothing. Layers with latent attention have no such weights to stack.
        """
        if self._prepared:
            return
        self._prepared = True
        linears, weight = self._context_linears(), None
        if linears and all(linear.is_plain for linear in linears):
            weight = self._stacked({})
            if self.spec.config.attention_bias:
                self.context_bias = self._stacked_bias()
        stored, keeps = None, self.spec.options.draft_weights == "checkpoint"
        # A norm's factors would have to be rounded into the rows.
        if (self._in_fp8 or keeps) and weight is not None and not self.spec.config.norm_context:
            stored = stored_context_rows(linears)
        if self._in_fp8:
            quantize_engine_drafter(self.drafter, self.plain_linear)
            if stored is None and weight is not None:
                stored = quantize(weight)
        elif keeps and (kept := keep_stored_rows(self.drafter)):
            quantization = self.spec.config.quantization
            self.logger.info(
                "draft weights: %d linears keep their FP8 rows (%s)", kept, quantization
            )
        drop_stored_rows(self.drafter)
        self.context_weight = weight if stored is None else stored

    @torch.no_grad()
    def take_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace weights of the running drafter, all or some, in their own storage.

        Args:
            tensors: canonical names, with the target's vocabulary, checked.

        Raises:
            DFlashError: the engine's own quantised linears have taken theirs apart.
        """
        if self.keeps_quantised_linears:
            raise DFlashError(
                "the drafter keeps its weights: draft_weights is 'checkpoint', and the engine's "
                "quantised linears take new ones at start alone; set it to 'dequantised'"
            )
        unrounded = copy_tensors(self.drafter, tensors, self.rank)
        if self.context_weight is not None:
            stacked = self._stacked(unrounded)
            if isinstance(self.context_weight, Fp8Rows):
                for kept, new in zip(self.context_weight, quantize(stacked), strict=True):
                    kept.copy_(new)
            else:
                self.context_weight.copy_(stacked)
            if self.context_bias is not None:
                self.context_bias.copy_(self._stacked_bias())
        self.derive()

    @property
    def keeps_quantised_linears(self) -> bool:
        """Whether the engine multiplies some linears as the checkpoint stores them."""
        return self.quantised is not None and bool(self.quantised.linears)

    def derive(self) -> None:
        """Make again what an engine's adapter derives from the weights, in place."""

    def _context_linears(self) -> list[QKVShard]:
        return [cast(QKVShard, layer.qkv_proj) for layer in self.drafter.plain_attentions()]

    def _stacked(self, unrounded: Mapping[nn.Module, Tensor]) -> Tensor:
        """``context_weight`` of the linears' weights, before rounding.

        Args:
            unrounded: weights of linears whose own are rounded by now.
        """
        parts = []
        for module, linear in zip(self.drafter.layers, self._context_linears(), strict=True):
            weight = unrounded.get(cast(nn.Module, linear))
            if weight is None:
                weight = plain_values(linear)
            part = weight[linear.query_width :]
            if self.spec.config.norm_context:
                # All layers divide a row by the same root mean square; the rest of each norm is a
                # factor a column.
                norm = cast(DraftLayer, module).attention_norm
                part = part.to(norm.weight.dtype) * norm.scale
            parts.append(part)
        return torch.cat(parts)

    def _stacked_bias(self) -> Tensor:
        linears = self._context_linears()
        return torch.cat([cast(Tensor, one.bias)[one.query_width :] for one in linears])

    def context_rows(self, context: Tensor) -> Tensor:
        """What ``context_weight`` multiplies, of context rows [..., hidden] as ``fuse`` gives them.

        Args:
            context: of the drafter.
        """
        config = self.spec.config
        if not config.norm_context:
            return context
        return F.rms_norm(context, context.shape[-1:], None, config.rms_norm_eps)

    @property
    def _in_fp8(self) -> bool:
        """Whether weights are rounded; decided once, when they are loaded and none is rounded."""
        if self._rounds is None:
            asked = self.spec.options.draft_weights
            self._rounds = asked == "fp8"
            if asked == "auto":
                device = next(self.drafter.parameters()).device
                obstacle = fp8_obstacle(self.drafter, self.plain_linear, device)
                self._rounds = obstacle is None
                kept = "FP8" if obstacle is None else self._kept(obstacle)
                self.logger.info("draft weights: %s", kept)
        return self._rounds

    def _kept(self, obstacle: str) -> str:
        """What the weights are where ``draft_weights: auto`` does not round them, and why."""
        if self.spec.config.quantization is None:
            return f"as they are, {obstacle}"
        more = dequantised_gib(self.spec.checkpoint, self.drafter.norm.weight.dtype)
        return (
            f"dequantised ({self.spec.config.quantization}), {more:.2f} GiB more than they are "
            f"stored in, {obstacle}; draft_weights 'checkpoint' keeps those quantised that the "
            "engine has linears for"
        )

    def shard_logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, rows] over this rank's rows of the head, padding left out.

        Args:
            hidden: [T, hidden].
        """
        raise NotImplementedError

    def shard_rows(self) -> int:
        """This rank's rows of the head that are tokens."""
        return shard_rows(self.drafter.head(), self.vocab_size)

    def shard_choice(self, hidden: Tensor) -> HeadChoice | None:
        """The likeliest token of each row over this rank's shard, found without logits.

        Args:
            hidden: [T, hidden].

        Returns:
            Row numbers of the head in ``tokens``; None where logits are to be made.
        """
        return best_of_shard(self.drafter.head(), hidden, self.shard_rows(), self.plain_head)

    def top_tokens(self, hidden: Tensor) -> Tensor:
        """The likeliest token ids int64 [T], without gathering the vocabulary's shards.

        The drafter's scale and soft-cap keep the order of logits, so they are left out.

        Args:
            hidden: [T, hidden].
        """
        choice = self.shard_choice(hidden)
        if choice is not None:
            logit, row = choice.logits, choice.tokens
        else:
            logit, row = self.filled_shard_logits(hidden).max(dim=-1, keepdim=True)
            row = row + first_token(self.drafter.head())
        if self.gather is None:
            return self.drafter.token_ids(row.squeeze(-1))
        best = best_of_ranks(logit.float().contiguous(), row.contiguous(), self.gather)
        return self.drafter.token_ids(best)

    def filled_shard_logits(self, hidden: Tensor) -> Tensor:
        """``shard_logits``, or one column of -inf where this rank has no tokens.

        All tokens of a small head may lie on other ranks.
        """
        logits = self.shard_logits(hidden)
        if logits.shape[-1] == 0:
            return logits.new_full((logits.shape[0], 1), float("-inf"))
        return logits

    def candidates(self, hidden: Tensor) -> Candidates:
        """The likeliest tokens of each row over all ranks, for the selector of DFlash 2 drafters.

        Args:
            hidden: [T, hidden].
        """
        return candidates(
            self.drafter,
            self.drafter.head(),
            hidden,
            self.shard_rows(),
            self.plain_head,
            self.shard_logits,
            self.gather,
        )
