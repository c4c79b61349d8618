"""The draft model that SGLang runs: the drafter on SGLang's layers, with its paged attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from sglang.srt.distributed.communication_op import tensor_model_parallel_all_gather
from sglang.srt.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.models.dflash import DFlashDraftModel
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin import kernels
from dflash_plugin.drafter import fused_block
from dflash_plugin.drafter.config import DrafterConfig, LayerAttention
from dflash_plugin.drafter.interfaces import Attend
from dflash_plugin.drafter.layers import DraftLayer
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.kernels.best_logits import best_logits
from dflash_plugin.kernels.fp8_rows import Fp8Rows, RoundedRows, fits
from dflash_plugin.kernels.inject_kv import KVPools, inject_kv
from dflash_plugin.kernels.vocab_topk import HeadChoice
from dflash_plugin.serving import KEY
from dflash_plugin.serving.draft_tokens import choice_of_ranks, first_token
from dflash_plugin.serving.engine_drafter import EngineDrafterMixin
from dflash_plugin.serving.fp8_weights import product
from dflash_plugin.serving.new_weights import take_weights
from dflash_plugin.serving.quantised_linears import quantised_linears
from dflash_plugin.serving.weights import check_features
from dflash_plugin.sglang import layers as sglang_layers
from dflash_plugin.sglang import surface, target_layers
from dflash_plugin.sglang.block_attention import is_plain
from dflash_plugin.sglang.last_layer import add_last_layer
from dflash_plugin.sglang.layers import SglangLayers, ShardedQKV
from dflash_plugin.sglang.options import DrafterSpec
from dflash_plugin.sglang.scale_out import splits, why_whole
from dflash_plugin.sglang.seams import features


class EngineDrafter(EngineDrafterMixin, DFlashDraftModel):
    """The draft model that SGLang's draft runner loads and calls.

    SGLang's own class is the base for the attributes that its versions read.

    Args:
        config: the configuration that the plugin staged.
        quant_config: the draft model's, or None.
        prefix: unused, the drafter's modules have their own names.
    """

    plain_linear = UnquantizedLinearMethod
    plain_head = UnquantizedEmbeddingMethod
    supports_fused_context_kv = False

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.config = config
        self.spec = DrafterSpec.model_validate(getattr(config, KEY))
        drafter_config = self.spec.config
        device = torch.empty(0).device
        self.quantised = quantised_linears(
            self.spec,
            torch.get_default_dtype(),
            device,
            sglang_layers.quant_config,
            self.logger,
            sglang_layers.quantisation_obstacle(device),
        )
        ranks = get_tensor_model_parallel_world_size()
        whole = not splits(drafter_config, ranks)
        if whole:
            self.logger.info(
                "every rank holds the whole drafter: %s", why_whole(drafter_config, ranks)
            )
        layers = SglangLayers(quant_config, self.quantised, whole=whole)
        self.drafter = Drafter(drafter_config, layers)
        self.drafter.requires_grad_(False)
        self.drafter.rotary.to(device)
        self.attentions = nn.ModuleList(
            RadixAttention(
                num_heads=attention.heads,
                head_dim=attention.head_dim,
                scaling=drafter_config.attention_scale,
                num_kv_heads=attention.kv_heads,
                layer_id=index,
                sliding_window_size=_window(drafter_config.layers[index], drafter_config),
                attn_type=(
                    AttentionType.DECODER
                    if drafter_config.layers[index].causal
                    else AttentionType.ENCODER_ONLY
                ),
            )
            for index, attention in enumerate(self.drafter.attentions())
        )
        self.vocab_size = int(config.vocab_size)
        self.block_size = drafter_config.block_size
        self.candidate_selector = None
        self.lilicorr = None
        self.is_nemotron_35_draft = False
        self._fused = kernels.available(device) and drafter_config.latent_attention is None
        self.gather = None if ranks == 1 else partial(tensor_model_parallel_all_gather, dim=-1)
        self.rank = 0 if whole else get_tensor_model_parallel_rank()
        self._key_weights: Tensor | None = None
        self._pools: Any = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the parameters: at start from the checkpoint, without a look at ``weights``.

        Raises:
            DFlashError: a tensor is not the drafter's; nothing has changed then.
        """
        if self._prepared:
            take_weights(self, weights)
        else:
            self.load_whole_checkpoint()

    def set_block_size(self, block_size: int) -> None:
        """Take the rows of a block, anchor included, from the worker."""
        self.block_size = int(block_size)

    def get_attention_sliding_window_size(self) -> int | None:
        """The one window of the sliding layers, as SGLang counts it, or None."""
        config = self.spec.config
        windows = [_window(layer, config) for layer in config.layers]
        return max((window for window in windows if window > 0), default=None)

    def bind(self, target: nn.Module) -> None:
        """Borrow the target's embedding and head, and prepare the drafter's weights.

        Args:
            target: the target model, loaded.

        Raises:
            DFlashError: it has no such modules or does not fit.
        """
        if target_layers.enable(target):
            surface.verify_features({features.OTHER_TARGETS})
        if type(target).__name__ in target_layers.TOLD_OUTPUTS:
            surface.verify_features({features.TOLD_OUTPUTS})
        model = cast(Any, target)
        embedding = surface.without_lora(model.get_input_embeddings())
        head = surface.without_lora(surface.head_of(model))
        self.borrow(target, embedding, head)
        captured = len(self.config.dflash_config["target_layer_ids"])
        if captured < len(self.spec.config.target_layer_ids):
            surface.verify_features({features.LAST_LAYER})
            add_last_layer(target, self.spec.config)
        self.prepare_weights()
        if self.quantised is not None:
            self.quantised.check()
        if self.spec.config.qk_norm:
            self._key_weights = self._stacked_key_norms()

    def derive(self) -> None:
        """Follow new weights: the key norms of all layers."""
        if self._key_weights is not None:
            self._key_weights.copy_(self._stacked_key_norms())

    def _stacked_key_norms(self) -> Tensor:
        attentions = self.drafter.plain_attentions()
        return torch.stack([cast(Tensor, one.key_norm.weight) for one in attentions])

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: Any,
        input_embeds: Tensor | None = None,
        get_embedding: bool = False,
        pp_proxy_tensors: Any = None,
    ) -> LogitsProcessorOutput:
        """Normed hidden states [T, hidden] of the rows of all requests' blocks.

        The drafter embeds ``input_ids`` [T] itself, so that its own embedding, mask vector and
        scale count. Row i + 1 of a block predicts draft i, whatever row does so in the checkpoint.
        """
        embedded = self.drafter.embed(self._tokens(input_ids))
        attend = partial(self._attend, forward_batch)
        hidden = self._run_block(embedded, positions, attend)
        if self.spec.config.sample_from_anchor:
            hidden = hidden.unflatten(0, (-1, self.block_size)).roll(1, dims=1).flatten(0, 1)
        return LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden)

    def _run_block(self, embedded: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if self._fused:
            return fused_block.run_block(self.drafter, embedded, positions, attend, self.block_size)
        return self.drafter.run_block(embedded, positions, attend, self.block_size)

    def _tokens(self, input_ids: Tensor) -> Tensor:
        """Block tokens, with a mask id that lies outside the target's vocabulary put in."""
        mask = self.spec.config.mask_token_id
        if mask < self.vocab_size:
            return input_ids
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        return input_ids.masked_fill(rows % self.block_size != 0, mask)

    def _attend(
        self, forward_batch: Any, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        sinks = self.drafter.sinks(layer)
        out: Tensor = self.attentions[layer](
            query.flatten(-2),
            key.flatten(-2),
            value.flatten(-2),
            forward_batch,
            **({} if sinks is None else {"sinks": sinks.float()}),
        )
        return out.view(query.shape)

    def inject(
        self,
        features: Tensor,
        positions: Tensor,
        slots: Tensor,
        pool: Any,
        committed: Tensor | None = None,
    ) -> None:
        """KV injection: write context rows into every draft layer's paged cache.

        Args:
            features: [T, n * target_hidden], the target layers' outputs.
            positions: int64 [T].
            slots: int64 [T], cache slots.
            pool: SGLang's KV pool of the draft model.
            committed: int32 [B]; T is B blocks, and only the first ``committed`` rows of each are
                written. None writes all.

        Raises:
            DFlashError: the target gave features of another width.
        """
        check_features(features.shape[-1], self.spec)
        pools = self._plain_pools(pool)
        if pools is None:
            context = self.drafter.fuse(features)
            self._inject_by_layer(context, positions, slots, pool, committed)
            return
        inject_kv(
            self._keys_values(self._context(features)),
            positions,
            slots,
            pools,
            self._key_weights,
            fused_block.norm_rope(self.drafter),
            committed=committed,
            value_scale=self.spec.config.attention_value_scale,
        )

    def _context(self, features: Tensor) -> Tensor | RoundedRows:
        """Context rows [T, hidden], rounded where their projection multiplies FP8."""
        if not self._fused:
            return self.drafter.fuse(features)
        weight = self.context_weight
        rounds = isinstance(weight, Fp8Rows) and fits(weight.values)
        return fused_block.fuse(
            self.drafter, features, rounds and not self.spec.config.norm_context
        )

    def _keys_values(self, context: Tensor | RoundedRows) -> Tensor:
        """Projections [T, layers, 2, kv_heads, head_dim] of context rows, not normed."""
        attentions = self.drafter.plain_attentions()
        if self.context_weight is not None:
            if isinstance(context, Tensor):
                context = self.context_rows(context)
            kv = product(context, self.context_weight, self.context_bias)
        else:
            assert isinstance(context, Tensor)
            kv = torch.cat(list(self._layer_keys_values(context)), dim=-1)
        first = attentions[0]
        return kv.view(kv.shape[0], len(attentions), 2, first.kv_heads, first.head_dim)

    def _layer_keys_values(self, context: Tensor) -> Iterator[Tensor]:
        """Projections [T, 2 * kv_heads * head_dim] of context rows by each layer in turn."""
        for module in self.drafter.layers:
            layer = cast(DraftLayer, module)
            rows = layer.attention_norm(context) if self.spec.config.norm_context else context
            yield cast(ShardedQKV, layer.attention.qkv_proj).keys_values(rows)

    def _plain_pools(self, pool: Any) -> Any:
        """The pool's buffers where rows can be written to directly, else None."""
        if self._pools is None:
            self._pools = False
            if self.spec.config.latent_attention is None and is_plain(pool):
                count = len(self.attentions)
                self._pools = KVPools.build(pool.k_buffer[:count], pool.v_buffer[:count])
        return self._pools or None

    def _inject_by_layer(
        self,
        context: Tensor,
        positions: Tensor,
        slots: Tensor,
        pool: Any,
        committed: Tensor | None,
    ) -> None:
        """Through the pool's own writers, which know its layout and scales."""
        if committed is not None and slots.device.type == "cpu":
            # The pool's writer of a part of each block is a kernel.
            rows = torch.arange(len(slots) // len(committed))
            kept = (rows < committed[:, None]).flatten()
            context, positions, slots = context[kept], positions[kept], slots[kept]
            committed = None
        pairs = self.drafter.context_keys_values(context, positions)
        for layer, (key, value) in zip(self.attentions, pairs, strict=True):
            attention = cast(Any, layer)
            scales = attention.k_scale, attention.v_scale
            if committed is None:
                pool.set_kv_buffer(attention, slots, key, value, *scales)
            else:
                by_request = slots.view(committed.shape[0], -1)
                pool.set_kv_buffer_prefix_valid(
                    attention, by_request, committed, key, value, *scales
                )

    def best_choice(self, hidden: Tensor) -> HeadChoice:
        """The likeliest draft of each row with its normalizer, the same bits on every rank.

        Args:
            hidden: [T, hidden].
        """
        choice = self.shard_choice(hidden)
        if choice is None:
            first = first_token(self.drafter.head())
            choice = best_logits(self.filled_shard_logits(hidden), 1, first_token=first)
        if self.gather is not None:
            choice = choice_of_ranks(choice, self.gather)
        return choice._replace(tokens=self.drafter.token_ids(choice.tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits float32 [T, draft vocabulary] of hidden states [T, hidden]."""
        if self.gather is None:
            return self.drafter.scale_logits(self.shard_logits(hidden).float())
        full = self.gather(self._all_rows(hidden).contiguous())
        rows = self.spec.config.draft_vocab_size or self.vocab_size
        return self.drafter.scale_logits(full[:, :rows].float())

    # A head that is the embedding of a Gemma target asks for gradients.
    @torch.no_grad()
    def shard_logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, rows] over this rank's rows of the head, padding left out."""
        head, rows = cast(Any, self.drafter.head()), self.shard_rows()
        if surface.is_dense(head):
            return F.linear(hidden.to(head.weight.dtype), head.weight[:rows])
        return self._all_rows(hidden)[:, :rows]

    @torch.no_grad()
    def _all_rows(self, hidden: Tensor) -> Tensor:
        """Logits over all of this rank's rows of the head."""
        head = cast(Any, self.drafter.head())
        if surface.is_dense(head):
            return F.linear(hidden.to(head.weight.dtype), head.weight)
        out: Tensor = head.quant_method.apply(head, hidden, None)
        return out


def _window(layer: LayerAttention, config: DrafterConfig) -> int:
    """The window in SGLang's convention, the row itself left out; -1 sees all positions.

    See ``serving.engine_drafter``.
    """
    if layer.sliding_window is None:
        return -1
    return layer.sliding_window - (config.window_from == "query")
