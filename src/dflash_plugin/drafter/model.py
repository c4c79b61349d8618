"""The DFlash drafter: a block-diffusion draft model that reads its target through KV injection.

Source: Chen, Liang, Liu, "DFlash: Block Diffusion for Flash Speculative Decoding"
(arXiv 2602.06036), sections 3 and 4; tensor names and arithmetic follow ``DFlashDraftModel`` and
``DFlash2DraftModel`` of PyPI dflash 0.1.0. The modules take linears, attention and key/value store
from a ``LayerFactory``, so an engine can lend its sharded linears and paged cache to the same
drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.decoding.draft_sampling import sharpen
from dflash_plugin.decoding.sampling import SamplingTensors, block_seeds, probabilities
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import Attend, ContextStore, LayerFactory
from dflash_plugin.drafter.latent_attention import LatentAttention
from dflash_plugin.drafter.layers import DraftAttention, DraftLayer, RMSNorm, TorchLayers
from dflash_plugin.drafter.rope import RotaryEmbedding
from dflash_plugin.drafter.selector import CandidateSelector, Proposal
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.draw_tokens import draw_tokens
from dflash_plugin.kernels.select_path import Limits
from dflash_plugin.kernels.uniforms import Stream, uniforms

# A CPU multiplies 8 rows by a head twice as fast as 7.
CPU_ROWS = 8


class Drafter(nn.Module):
    """A drafter that injects context once and then drafts a block per call.

    ``borrow`` gives it the target's embedding and head where the checkpoint has none of its own.
    """

    d2t: Tensor | None

    def __init__(self, config: DrafterConfig, factory: LayerFactory | None = None) -> None:
        super().__init__()
        factory = factory or TorchLayers()
        self.config = config
        gemma = config.norm_style == "gemma"
        self.fc = factory.replicated_linear(
            len(config.target_layer_ids) * config.target_hidden_size,
            config.hidden_size,
            bias=False,
            name="fc",
        )
        self.tap_norms = (
            nn.ModuleList(
                RMSNorm(config.target_hidden_size, config.rms_norm_eps, gemma)
                for _ in config.target_layer_ids
            )
            if config.norm_per_tap
            else None
        )
        self.context_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, gemma)
        self.layers = nn.ModuleList(
            DraftLayer(config, index, factory) for index in range(len(config.layers))
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, gemma)
        self.rotary = RotaryEmbedding(config)
        self.mask_embedding = (
            nn.Parameter(torch.zeros(config.hidden_size)) if config.own_mask_embedding else None
        )
        self.own_embedding = (
            nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
            if config.own_embedding
            else None
        )
        head_rows = config.draft_vocab_size or config.vocab_size
        self.own_head = (
            factory.head(head_rows, config.hidden_size, "lm_head") if config.own_head else None
        )
        self.register_buffer(
            "d2t",
            torch.zeros(config.draft_vocab_size, dtype=torch.int64)
            if config.draft_vocab_size
            else None,
        )
        self.candidate_selector = CandidateSelector(config, factory) if config.selector else None
        self._target_embedding: list[Callable[[Tensor], Tensor]] = []
        self._target_factor = 1.0
        self._target_head: list[nn.Module] = []
        self.store: ContextStore | None = None

    def borrow(
        self,
        weight: Tensor,
        head: nn.Module,
        lookup: Callable[[Tensor], Tensor] | None = None,
        factor: float = 1.0,
    ) -> None:
        """Use the target's embedding and output head.

        Args:
            weight: the embedding, [rows, hidden].
            head: makes logits [..., vocab] of hidden states [..., hidden].
            lookup: stored rows of token ids where ``weight`` is only one shard of the embedding.
            factor: of the target on its rows, from ``embedding_factor``; it counts where the
                checkpoint names none.

        Raises:
            DFlashError: the widths differ.
        """
        if weight.shape[1] != self.config.hidden_size and self.own_embedding is None:
            raise DFlashError(
                f"the target's embedding is {weight.shape[1]} wide but the drafter's "
                f"hidden_size is {self.config.hidden_size}: use a drafter made for this target, "
                "or one with its own embedding"
            )
        self._target_embedding = [lookup or partial(F.embedding, weight=weight)]
        if weight.is_floating_point():  # Targets round it as they do their rows.
            factor = float(torch.tensor(factor, dtype=weight.dtype, device="cpu"))
        self._target_factor = factor
        self._target_head = [head]

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of token ids int64 [...]."""
        if self.mask_embedding is None:
            embedded = self._look_up(tokens)
        else:
            is_mask = tokens == self.config.mask_token_id
            # The mask's id may lie outside the embedding.
            embedded = self._look_up(tokens.masked_fill(is_mask, 0))
            mask_row = self.mask_embedding.to(embedded.dtype)
            embedded = torch.where(is_mask.unsqueeze(-1), mask_row, embedded)
        if self.embedding_scale != 1.0:
            embedded = embedded * self.embedding_scale
        return embedded.to(self.norm.weight.dtype)

    @property
    def embedding_scale(self) -> float:
        """Factor on embedded rows: the checkpoint's, else the target's on its own."""
        if self.config.embedding_scale is not None:
            return self.config.embedding_scale
        return self._target_factor if self.own_embedding is None else 1.0

    def _look_up(self, tokens: Tensor) -> Tensor:
        if self.own_embedding is not None:
            return F.embedding(tokens, self.own_embedding)
        return self._target_embedding[0](tokens)

    def fuse(self, features: Tensor) -> Tensor:
        """Context rows [..., hidden] of features [..., n * target_hidden].

        The features are the target layers' outputs, concatenated in the order of
        ``target_layer_ids``.
        """
        context: Tensor = self.context_norm(self.fc(self.taps(features)))
        return context

    def taps(self, features: Tensor) -> Tensor:
        """Features [..., n * target_hidden] in the drafter's dtype, normed layer by layer if so."""
        features = features.to(self.norm.weight.dtype)
        if self.tap_norms is None:
            return features
        parts = features.chunk(len(self.tap_norms), dim=-1)
        return torch.cat(
            [norm(part) for norm, part in zip(self.tap_norms, parts, strict=True)], dim=-1
        )

    def context_keys_values(
        self, context: Tensor, positions: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of every draft layer for context rows.

        Args:
            context: [B, T, hidden], from ``fuse``.
            positions: int64 [B, T].

        Yields:
            Per layer, key and value [B, T, kv_heads, head_dim].
        """
        tables = self.rotary.tables(positions, context.dtype)
        for module in self.layers:
            layer = cast(DraftLayer, module)
            rows = layer.attention_norm(context) if self.config.norm_context else context
            yield layer.attention.context(rows, self.rotary, tables)

    def inject(self, features: Tensor, positions: Tensor) -> None:
        """Write the context's keys and values of all layers into the store, once.

        Args:
            features: [B, T, n * target_hidden].
            positions: int64 [B, T]; rows at a position below zero (padding, rejected tokens) are
                dropped and never enter the store.
        """
        assert self.store is not None, "set drafter.store before injecting"
        pairs = self.context_keys_values(self.fuse(features), positions.clamp(min=0))
        for index, (key, value) in enumerate(pairs):
            self.store.write(index, key, value, positions)

    def attentions(self) -> list[DraftAttention | LatentAttention]:
        """The attention of every layer."""
        return [cast(DraftLayer, layer).attention for layer in self.layers]

    def plain_attentions(self) -> list[DraftAttention]:
        """The same where one linear makes queries, keys and values; none in latent attention."""
        return [layer for layer in self.attentions() if isinstance(layer, DraftAttention)]

    def sinks(self, layer: int) -> Tensor | None:
        """Attention sinks [heads] of a layer, if it has them."""
        return self.attentions()[layer].sinks

    def run_block(
        self,
        embedded: Tensor,
        positions: Tensor,
        attend: Attend,
        block_size: int | Tensor | None = None,
    ) -> Tensor:
        """Hidden states of block rows, normed.

        Args:
            embedded: [..., T, hidden], blocks one after the other.
            positions: int64 [..., T].
            attend: attention over the context and each row's own block.
            block_size: rows of a block, where they are not the configuration's; a tensor, int64 of
                no dimension, where a compiled or captured pass is to follow its value.

        Returns:
            [..., T, hidden].
        """
        size = self.config.block_size if block_size is None else block_size
        tables = self.rotary.tables(positions, embedded.dtype)
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden, self.rotary, tables, attend, size)
        out: Tensor = self.norm(hidden)
        return out

    def draft(self, anchors: Tensor, positions: Tensor) -> Tensor:
        """Run one block per request.

        Args:
            anchors: int64 [B], the last committed tokens, whose features are not known yet.
            positions: int64 [B], their positions.

        Returns:
            [B, num_draft_tokens, hidden], the rows that predict the next positions.
        """
        assert self.store is not None, "set drafter.store before drafting"
        size = self.config.block_size
        tokens = anchors.new_full((anchors.shape[0], size), self.config.mask_token_id)
        tokens[:, 0] = anchors
        offsets = torch.arange(size, device=positions.device)
        hidden = self.run_block(
            self.embed(tokens), positions[:, None] + offsets, self.store.block(positions, size)
        )
        return hidden[:, size - self.config.num_draft_tokens :]

    def propose(
        self,
        hidden: Tensor,
        anchors: Tensor,
        positions: Tensor,
        sampling: SamplingTensors | None = None,
        factors: Tensor | None = None,
        limited: bool = True,
    ) -> Proposal:
        """Choose or draw the drafts of each block.

        Drafts are drawn with noise of the block's own: how far a block is accepted depends on all
        of its drafts, so that a position which is drafted again must be drawn anew.

        Args:
            hidden: [B, K, hidden], from ``draft``.
            anchors: int64 [B], the blocks' anchors.
            positions: int64 [B], their positions, which key the noise of draws.
            sampling: of the B requests; None chooses the best everywhere.
            factors: float32 [B, K], parts of the temperatures that drafts are drawn at
                (``decoding.draft_sampling``); None draws at the requests' own.
            limited: False where no request has top-k, top-p or min-p, which saves a sort.
        """
        logits = self.logits(hidden)
        u = None
        if sampling is not None:
            offsets = torch.arange(1, hidden.shape[1] + 1, device=positions.device)
            seeds = block_seeds(sampling.seed, positions)
            u = uniforms(seeds, positions[:, None] + offsets, Stream.DRAFT)
        if self.candidate_selector is not None:
            best = logits.topk(self.candidate_selector.top_k, dim=-1)
            temperature = limits = None
            if sampling is not None:
                temperature = sampling.temperature
                limits = Limits(sampling.top_k, sampling.top_p, sampling.min_p, factors)
            path: Proposal = self.candidate_selector(
                best.indices, best.values, hidden, anchors, temperature, u, limits
            )
            if sampling is None or factors is None:
                return path
            return path._replace(own_probs=probabilities(path.scores, sampling))
        if sampling is None or u is None:
            return Proposal(self.token_ids(logits.argmax(dim=-1)), logits)
        probs = probabilities(logits, sampling, limited)
        if factors is None:
            return Proposal(self.token_ids(draw_tokens(probs, u)), logits, probs)
        sharper = sharpen(probs, factors)
        tokens = self.token_ids(draw_tokens(sharper, u))
        return Proposal(tokens, logits, sharper, own_probs=probs)

    def plain_head(self) -> Tensor | None:
        """The head's weight where logits are its product with hidden states and nothing else."""
        if self.config.logit_scale != 1.0 or self.config.logit_softcap is not None:
            return None
        head = self.head()
        return head.weight if isinstance(head, nn.Linear) and head.bias is None else None

    def replace_borrowed_head(self, head: nn.Module) -> None:
        """Draft with another head than the target's, such as a quantized copy of it."""
        self._target_head = [head]

    def head(self) -> nn.Module:
        """The output head in use, the drafter's own or the target's."""
        return self._target_head[0] if self.own_head is None else self.own_head

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits [..., draft vocabulary] of hidden states; ``token_ids`` names its rows."""
        rows = hidden.flatten(0, -2)
        count = rows.shape[0]
        if rows.device.type == "cpu" and count > 1:
            rows = F.pad(rows, (0, 0, 0, -count % CPU_ROWS))
        logits = self.head()(rows)[:count].view(*hidden.shape[:-1], -1)
        return self.scale_logits(logits)

    def scale_logits(self, logits: Tensor) -> Tensor:
        """Draft logits of what the head gives, with the drafter's scale and soft-cap."""
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits

    def token_ids(self, draft_ids: Tensor) -> Tensor:
        """The target's ids of draft-vocabulary ids int64 [...]."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def target_probabilities(
        self, probabilities: Tensor, vocab_size: int, candidates: Tensor | None = None
    ) -> Tensor:
        """Spread draft probabilities over the target's vocabulary.

        Args:
            probabilities: [..., C].
            vocab_size: of the target.
            candidates: int64 [..., C], the tokens they are of; None means the draft
                vocabulary.
        """
        if candidates is None and self.d2t is None and probabilities.shape[-1] == vocab_size:
            return probabilities
        full = probabilities.new_zeros(*probabilities.shape[:-1], vocab_size)
        if candidates is not None:
            return full.scatter_(-1, candidates, probabilities)
        columns = torch.arange(probabilities.shape[-1], device=probabilities.device)
        return full.index_copy_(-1, self.token_ids(columns), probabilities)
