"""The DFlash drafter: a block-diffusion draft model that reads its target through KV injection.

Source: Chen, Liang, Liu, "DFlash: Block Diffusion for Flash Speculative Decoding"
(arXiv 2602.06036), sections 3 and 4; tensor names and arithmetic follow ``DFlashDraftModel`` and
``DFlash2DraftModel`` of PyPI dflash 0.1.0. The modules take linears, attention and key/value store
from a ``LayerFactory``, so an engine can lend its sharded linears and paged cache to the same
drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from dflash_plugin.checkpoints.io import Checkpoint
from dflash_plugin.decoding.sampling import SamplingTensors, probabilities
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.convolution import DynamicConvolution
from dflash_plugin.drafter.interfaces import Attend, ContextStore, LayerFactory, QKVLinear
from dflash_plugin.drafter.rope import RotaryEmbedding
from dflash_plugin.drafter.selector import CandidateSelector, Proposal
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream, uniforms

# A CPU multiplies 8 rows by a head twice as fast as 7.
CPU_ROWS = 8


class TorchQKV(nn.Linear):
    """``QKVLinear`` on one device."""

    def __init__(self, config: DrafterConfig) -> None:
        self.query_width = config.num_attention_heads * config.head_dim
        width = self.query_width + 2 * config.num_key_value_heads * config.head_dim
        super().__init__(config.hidden_size, width, bias=config.attention_bias)

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys and values alone."""
        bias = None if self.bias is None else self.bias[self.query_width :]
        return F.linear(x, self.weight[self.query_width :], bias)


class TorchLayers:
    """Plain torch linears on one device."""

    shards = 1

    def qkv_linear(self, config: DrafterConfig, name: str) -> nn.Module:
        """One linear over queries, keys and values."""
        return TorchQKV(config)

    def column_linear(
        self, in_features: int, out_features: Sequence[int], bias: bool, name: str
    ) -> nn.Module:
        """One linear over the concatenated parts."""
        return nn.Linear(in_features, sum(out_features), bias=bias)

    def row_linear(self, in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
        """A plain linear."""
        return nn.Linear(in_features, out_features, bias=bias)

    def replicated_linear(
        self, in_features: int, out_features: int, bias: bool, name: str
    ) -> nn.Module:
        """A plain linear."""
        return nn.Linear(in_features, out_features, bias=bias)

    def head(self, rows: int, hidden_size: int, name: str) -> nn.Module:
        """A plain linear."""
        return nn.Linear(hidden_size, rows, bias=False)


class RMSNorm(nn.Module):
    """Root-mean-square norm; "gemma" style multiplies by 1 + weight."""

    def __init__(self, dim: int, eps: float, gemma: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if gemma else torch.ones(dim))
        self.eps = eps
        self.gemma = gemma

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        weight = 1.0 + self.weight if self.gemma else self.weight
        return F.rms_norm(x, self.weight.shape, weight.to(x.dtype), self.eps)


class DraftAttention(nn.Module):
    """Projections, norms and rotation of one layer; the attention itself is the host's."""

    def __init__(self, config: DrafterConfig, index: int, host: LayerFactory) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // host.shards
        self.kv_heads = max(1, config.num_key_value_heads // host.shards)
        self.value_scale = config.attention_value_scale
        name = f"layers.{index}.self_attn"
        self.qkv_proj = host.qkv_linear(config, f"{name}.qkv_proj")
        self.output_proj = host.row_linear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            config.attention_output_bias,
            f"{name}.o_proj",
        )
        gemma = config.norm_style == "gemma"
        eps = config.rms_norm_eps
        self.query_norm = RMSNorm(self.head_dim, eps, gemma) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, eps, gemma) if config.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.attention_sinks else None

    def context(
        self, x: Tensor, rotary: RotaryEmbedding, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of context rows x [..., hidden], each [..., kv_heads, head_dim]."""
        kv = cast(QKVLinear, self.qkv_proj).keys_values(x)
        return self._finish(kv, rotary, tables)

    def _finish(
        self, kv: Tensor, rotary: RotaryEmbedding, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Normed, rotated keys and scaled values of projections [..., 2 * kv_heads * dim]."""
        key, value = kv.unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(-3)
        key = rotary.rotate(self.key_norm(key), tables)
        return key, value if self.value_scale is None else value * self.value_scale

    def forward(
        self,
        x: Tensor,
        rotary: RotaryEmbedding,
        tables: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> Tensor:
        """Attention of block rows x [B, T, hidden] over the context and each other."""
        width = self.heads * self.head_dim
        query, kv = self.qkv_proj(x).split([width, 2 * self.kv_heads * self.head_dim], dim=-1)
        query = query.unflatten(-1, (self.heads, self.head_dim))
        query = rotary.rotate(self.query_norm(query), tables)
        key, value = self._finish(kv, rotary, tables)
        out: Tensor = self.output_proj(attend(self.index, query, key, value).flatten(-2))
        return out


class DraftMLP(nn.Module):
    """Gated MLP."""

    def __init__(self, config: DrafterConfig, index: int, host: LayerFactory) -> None:
        super().__init__()
        name, inner = f"layers.{index}.mlp", config.intermediate_size
        self.gate_up_proj = host.column_linear(
            config.hidden_size, [inner, inner], config.mlp_bias, f"{name}.gate_up_proj"
        )
        self.down_proj = host.row_linear(
            inner, config.hidden_size, config.mlp_bias, f"{name}.down_proj"
        )
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``down(act(gate(x)) * up(x))``."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate) * up)
        return out


class DraftLayer(nn.Module):
    """Pre-norm attention and MLP with residuals, each within a convolution in DFlash 2."""

    attention_conv: DynamicConvolution | None
    mlp_conv: DynamicConvolution | None

    def __init__(self, config: DrafterConfig, index: int, host: LayerFactory) -> None:
        super().__init__()
        gemma = config.norm_style == "gemma"
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, gemma)
        self.attention = DraftAttention(config, index, host)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, gemma)
        self.mlp = DraftMLP(config, index, host)
        self.attention_conv = self.mlp_conv = None
        if config.convolution is not None:
            name = f"layers.{index}"
            self.attention_conv = DynamicConvolution(config, host, f"{name}.attention_conv")
            self.mlp_conv = DynamicConvolution(config, host, f"{name}.mlp_conv")

    def forward(
        self,
        x: Tensor,
        rotary: RotaryEmbedding,
        tables: tuple[Tensor, Tensor],
        attend: Attend,
        block_size: int,
    ) -> Tensor:
        """One layer over block rows [..., T, hidden]."""

        def attention(rows: Tensor) -> Tensor:
            return cast(Tensor, self.attention(rows, rotary, tables, attend))

        x = x + _within(self.attention_conv, self.attention_norm(x), attention, block_size)
        return x + _within(self.mlp_conv, self.mlp_norm(x), self.mlp, block_size)


def _within(
    convolution: DynamicConvolution | None,
    x: Tensor,
    sublayer: Callable[[Tensor], Tensor],
    block_size: int,
) -> Tensor:
    return sublayer(x) if convolution is None else convolution(x, sublayer, block_size)


class Drafter(nn.Module):
    """A drafter that injects context once and then drafts a block per call.

    ``borrow`` gives it the target's embedding and head where the checkpoint has none of its own.
    """

    d2t: Tensor | None

    def __init__(self, config: DrafterConfig, host: LayerFactory | None = None) -> None:
        super().__init__()
        host = host or TorchLayers()
        self.config = config
        gemma = config.norm_style == "gemma"
        self.fc = host.replicated_linear(
            len(config.target_layer_ids) * config.target_hidden_size,
            config.hidden_size,
            bias=False,
            name="fc",
        )
        self.context_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, gemma)
        self.layers = nn.ModuleList(
            DraftLayer(config, index, host) for index in range(len(config.layers))
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
            host.head(head_rows, config.hidden_size, "lm_head") if config.own_head else None
        )
        self.register_buffer(
            "d2t",
            torch.zeros(config.draft_vocab_size, dtype=torch.int64)
            if config.draft_vocab_size
            else None,
        )
        self.candidate_selector = CandidateSelector(config, host) if config.selector else None
        self._target_embedding: list[Callable[[Tensor], Tensor]] = []
        self._target_head: list[nn.Module] = []
        self.store: ContextStore | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, host: LayerFactory | None = None) -> Drafter:
        """Build a drafter and fill it with a checkpoint's tensors, in their dtype."""
        drafter = cls(checkpoint.config, host)
        drafter.to(checkpoint.tensors["norm.weight"].dtype)
        drafter.load_canonical(checkpoint.tensors)
        return drafter.eval()

    def borrow(
        self, weight: Tensor, head: nn.Module, lookup: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Use the target's embedding and output head.

        Args:
            weight: the embedding, [rows, hidden].
            head: makes logits [..., vocab] of hidden states [..., hidden].
            lookup: rows of token ids where ``weight`` is only one shard of the embedding.

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
        if self.config.embedding_scale != 1.0:
            embedded = embedded * self.config.embedding_scale
        return embedded.to(self.norm.weight.dtype)

    def _look_up(self, tokens: Tensor) -> Tensor:
        if self.own_embedding is not None:
            return F.embedding(tokens, self.own_embedding)
        return self._target_embedding[0](tokens)

    def fuse(self, features: Tensor) -> Tensor:
        """Context rows [..., hidden] of features [..., n * target_hidden].

        The features are the target layers' outputs, concatenated in the order of
        ``target_layer_ids``.
        """
        context: Tensor = self.context_norm(self.fc(features.to(self.norm.weight.dtype)))
        return context

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
        for attention in self.attentions():
            yield attention.context(context, self.rotary, tables)

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

    def attentions(self) -> list[DraftAttention]:
        """The attention of every layer."""
        return [cast(DraftLayer, layer).attention for layer in self.layers]

    def sinks(self, layer: int) -> Tensor | None:
        """Attention sinks [heads] of a layer, if it has them."""
        return self.attentions()[layer].sinks

    def run_block(
        self, embedded: Tensor, positions: Tensor, attend: Attend, block_size: int | None = None
    ) -> Tensor:
        """Hidden states of block rows, normed.

        Args:
            embedded: [..., T, hidden], blocks one after the other.
            positions: int64 [..., T].
            attend: attention over the context and each row's own block.
            block_size: rows of a block, where they are not the configuration's.

        Returns:
            [..., T, hidden].
        """
        size = block_size or self.config.block_size
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
    ) -> Proposal:
        """Choose or draw the drafts of each block.

        Args:
            hidden: [B, K, hidden], from ``draft``.
            anchors: int64 [B], the blocks' anchors.
            positions: int64 [B], their positions, which key the noise of draws.
            sampling: of the B requests; None chooses the best everywhere. A selector draws at their
                temperature alone.
        """
        logits = self.logits(hidden)
        u = None
        if sampling is not None:
            offsets = torch.arange(1, hidden.shape[1] + 1, device=positions.device)
            u = uniforms(sampling.seed, positions[:, None] + offsets, Stream.DRAFT)
        if self.candidate_selector is not None:
            best = logits.topk(self.candidate_selector.top_k, dim=-1)
            temperature = None if sampling is None else sampling.temperature
            path: Proposal = self.candidate_selector(
                best.indices, best.values, hidden, anchors, temperature, u
            )
            return path
        if sampling is None or u is None:
            return Proposal(self.token_ids(logits.argmax(dim=-1)), logits)
        probs = probabilities(logits, sampling)
        return Proposal(self.token_ids(sample(probs, u)), logits, probs)

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
            candidates: int64 [..., C], the tokens they are of; None stands for the draft
                vocabulary.
        """
        if candidates is None and self.d2t is None and probabilities.shape[-1] == vocab_size:
            return probabilities
        full = probabilities.new_zeros(*probabilities.shape[:-1], vocab_size)
        if candidates is not None:
            return full.scatter_(-1, candidates, probabilities)
        columns = torch.arange(probabilities.shape[-1], device=probabilities.device)
        return full.index_copy_(-1, self.token_ids(columns), probabilities)

    def load_canonical(self, tensors: dict[str, Tensor]) -> None:
        """Fill from a checkpoint's canonical tensor names (z-lab's)."""
        state = {own: _join(names, tensors) for own, names in self.checkpoint_names().items()}
        self.load_state_dict(state)

    def canonical(self) -> dict[str, Tensor]:
        """The tensors under their checkpoint names."""
        state = self.state_dict()
        tensors: dict[str, Tensor] = {}
        query = self.config.num_attention_heads * self.config.head_dim
        kv = self.config.num_key_value_heads * self.config.head_dim
        inner = self.config.intermediate_size
        sizes = {2: [inner, inner], 3: [query, kv, kv]}
        for own, names in self.checkpoint_names().items():
            parts = state[own].split(sizes[len(names)]) if len(names) > 1 else (state[own],)
            tensors.update({name: part.clone() for name, part in zip(names, parts, strict=True)})
        return tensors

    def checkpoint_names(self) -> dict[str, tuple[str, ...]]:
        """Checkpoint names behind each entry of ``state_dict``, merged ones in order."""
        renamed = {
            "context_norm": "hidden_norm",
            "attention_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "attention": "self_attn",
            "query_norm": "q_norm",
            "key_norm": "k_norm",
            "output_proj": "o_proj",
            "sinks": "attention_sink_bias",
            "own_embedding": "embed_tokens.weight",
            "own_head": "lm_head",
        }
        merged = {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }
        names: dict[str, tuple[str, ...]] = {}
        for own in self.state_dict():
            parts = [renamed.get(part, part) for part in own.split(".")]
            key = next((part for part in parts if part in merged), None)
            joined = ".".join(parts)
            names[own] = (
                tuple(joined.replace(key, part) for part in merged[key]) if key else (joined,)
            )
        return names


def _join(names: tuple[str, ...], tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name] for name in names]) if len(names) > 1 else tensors[names[0]]
