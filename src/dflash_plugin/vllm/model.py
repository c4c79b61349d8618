"""The draft model that vLLM runs: the drafter on vLLM's layers, with its paged attention."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM
from vllm.model_executor.models.utils import maybe_prefix
from vllm.platforms import current_platform

from dflash_plugin.drafter.config import LayerAttention
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.serving.engine_drafter import EngineDrafterMixin
from dflash_plugin.serving.fp8_weights import is_rounded, product
from dflash_plugin.serving.new_weights import take_weights
from dflash_plugin.serving.quantised_linears import quantised_linears
from dflash_plugin.serving.weights import check_features, draft_columns
from dflash_plugin.vllm.attention import PagedAttention
from dflash_plugin.vllm.layers import VllmLayers, quant_config
from dflash_plugin.vllm.options import required_spec
from dflash_plugin.vllm.scale_out import draft_shards
from dflash_plugin.vllm.surface import final_norm, target_modules, verify_worker

if TYPE_CHECKING:
    from dflash_plugin.kernels.vocab_topk import HeadChoice

logger = logging.getLogger("vllm.dflash_plugin")

Slots = Tensor | Sequence[Tensor | None] | None


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class DraftBlock(nn.Module):
    """Embedding, layers and final norm over the rows of all requests' blocks.

    Attributes:
        block_size: rows of a block, int64 of no dimension; see ``lay_out``.
        quantised: the linears that stay as a quantised checkpoint stores them, or None.
    """

    block_size: Tensor

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        spec = required_spec(vllm_config)
        config, device = spec.config, vllm_config.device_config.device
        first = vllm_config.model_config.get_total_num_hidden_layers()
        self.quantised = quantised_linears(
            spec, torch.get_default_dtype(), device, quant_config, logger
        )
        layers = VllmLayers(prefix, first, draft_shards(vllm_config), self.quantised)
        self.drafter = Drafter(config, layers)
        self.drafter.rotary.to(device)
        self.drafter.requires_grad_(False)
        for module in self.drafter.modules():
            if isinstance(module, LinearBase):
                # A CPU would pack a plain weight and drop it, and new ones could not be loaded.
                plain = isinstance(module.quant_method, UnquantizedLinearMethod)
                cast(Any, module)._cpu_skip_gemm_dispatch = plain
        drafts = vllm_config.speculative_config.num_speculative_tokens
        rows = torch.tensor(int(drafts) + (not config.sample_from_anchor), device=device)
        # A buffer, which compiled and captured passes follow; they would keep a number.
        self.register_buffer("block_size", rows, persistent=False)
        # Layers of one group run alike, causal or not.
        joins = (
            len({layer.causal for layer in config.layers}) == 1
            and len({layer.sliding_window for layer in config.layers} - {None}) == 1
        )
        self.attentions = nn.ModuleList(
            PagedAttention(
                vllm_config,
                layers.full_name(f"layers.{index}.self_attn.attn"),
                attention,
                scale=config.attention_scale,
                window=_window(config.layers[index], config.window_from),
                joins_full_layers=joins,
            )
            for index, attention in enumerate(self.drafter.attentions())
        )

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Normed hidden states [T, hidden] of rows ``input_ids`` [T] at ``positions`` [T]."""
        embedded = self.drafter.embed(input_ids)
        return self.drafter.run_block(embedded, positions, self._attend, self.block_size)

    def lay_out(self, rows: int) -> None:
        """Run blocks of this many rows; one launch, in drafters whose layers look at the block."""
        if self.drafter.config.convolution is not None:
            self.block_size.fill_(rows)

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.attentions[layer](query, key, value)
        return out.view_as(query)


class EngineDrafter(EngineDrafterMixin, DFlashQwen3ForCausalLM):
    """The draft model that vLLM's runners call; the V1 runner asks for vLLM's class."""

    plain_linear = UnquantizedLinearMethod
    plain_head = UnquantizedEmbeddingMethod
    logger = logger

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)
        speculative = vllm_config.speculative_config
        self.spec = required_spec(vllm_config)
        self.config = speculative.draft_model_config.hf_config
        verify_worker(vllm_config)
        self.model = DraftBlock(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.drafter: Drafter = self.model.drafter
        self.quantised = self.model.quantised
        # The names by which vLLM's loaders decide what to take from the target.
        self.has_own_embed_tokens = self.spec.config.own_embedding
        self.has_own_lm_head = self.spec.config.own_head
        if self.has_own_lm_head:
            self.lm_head = self.drafter.own_head
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        drafter_config = self.spec.config
        head_rows = drafter_config.draft_vocab_size or (
            drafter_config.vocab_size if self.has_own_lm_head else self.vocab_size
        )
        self.logits_processor = LogitsProcessor(head_rows)
        self._draft_columns: Tensor | None = None
        self._num_target_layers = vllm_config.model_config.get_total_num_hidden_layers()
        # The target's, where its last layer is read; in a tuple so that it is no module of ours.
        self._last_norm: tuple[nn.Module] | None = None
        is_whole = get_tensor_model_parallel_world_size() == 1
        self.gather = None if is_whole else tensor_model_parallel_all_gather
        # Of this rank's shard of the layers.
        self.rank = get_tensor_model_parallel_rank() if draft_shards(vllm_config) > 1 else 0
        self._finish = self._finish_context
        if vllm_config.compilation_config.mode != CompilationMode.NONE:
            self._finish = torch.compile(
                self._finish_context,
                dynamic=True,
                fullgraph=True,
                backend=current_platform.simple_compile_backend,
            )

    def load_checkpoint(self) -> None:
        """Fill the parameters from the checkpoint, each by its own loader.

        Raises:
            DFlashError: the checkpoint is malformed or maps tokens that the target lacks.
        """
        self.load_whole_checkpoint()
        self.prepare_weights()
        self._draft_columns = draft_columns(self.drafter)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Replace weights while the engine runs; the start calls ``load_checkpoint``.

        Raises:
            DFlashError: a tensor is not the drafter's; nothing has changed then.
        """
        return take_weights(self, weights)

    def derive(self) -> None:
        """Follow new weights: reduced columns, a head that a CPU packed, sinks that were cast."""
        head = self.drafter.own_head
        if head is not None and current_platform.is_cpu() and not is_rounded(head):
            cast(Any, head).quant_method.process_weights_after_loading(head)
        columns = draft_columns(self.drafter)
        if columns is not None and self._draft_columns is not None:
            self._draft_columns.copy_(columns)
        for index, layer in enumerate(self._attentions()):
            sinks = self.drafter.sinks(index)
            if sinks is not None:
                layer.take_sinks(sinks)

    def bind(self, target_model: nn.Module) -> None:
        """Borrow the target's embedding and head, and prepare the drafter's weights.

        Raises:
            DFlashError: the target has no such modules or does not fit.
        """
        embedding, head = target_modules(target_model)
        if isinstance(embedding, BaseLayerWithLoRA):
            embedding = embedding.base_layer
        self.borrow(target_model, embedding, head)
        config = self.spec.config
        if config.last_layer_normed and self._num_target_layers - 1 in config.target_layer_ids:
            self._last_norm = (final_norm(target_model),)
        self.lm_head = self.drafter.head()
        # Registered, so that compilation sees a parameter instead of a constant.
        self.model.embed_tokens = cast(nn.Module, embedding)
        # Dummy weights are not announced by a loader, so they are prepared here.
        self.prepare_weights()
        if self.quantised is not None:
            self.quantised.check()

    def forward(
        self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states [T, hidden] of the rows of all requests' blocks."""
        hidden: Tensor = self.model(input_ids, positions, None)
        return hidden

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """Context rows [T, hidden] of the target layers' outputs [T, n * target_hidden].

        Raises:
            DFlashError: the target gave another number of layers.
        """
        check_features(hidden_states.shape[-1], self.spec)
        if self._last_norm is not None:
            # Features are in the order of the layers.
            width = self.spec.config.target_hidden_size
            others, last = hidden_states.split([hidden_states.shape[-1] - width, width], dim=-1)
            hidden_states = torch.cat([others, self._last_norm[0](last)], dim=-1)
        return self.drafter.fuse(hidden_states)

    def precompute_and_store_context_kv(
        self,
        context_states: Tensor,
        context_positions: Tensor,
        context_slot_mapping: Slots = None,
    ) -> None:
        """KV injection: write context rows into every layer's paged cache.

        Args:
            context_states: [T, hidden], from ``combine_hidden_states``.
            context_positions: int64 [T].
            context_slot_mapping: cache slots [T], one tensor or one for each name of
                ``get_draft_kv_cache_layer_names``; rows at -1 are dropped. None computes and
                stores nothing, for memory profiling.
        """
        pairs = self._context(context_states, context_positions)
        if isinstance(context_slot_mapping, Sequence):
            slots = iter(context_slot_mapping)
        else:
            slots = repeat(context_slot_mapping)
        for attention, (key, value) in zip(self._attentions(), pairs, strict=True):
            attention.store(key, value, list(islice(slots, len(attention.pages))))

    def _context(self, context: Tensor, positions: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Per layer, keys and values [T, kv_heads, head_dim] of context rows."""
        if self.context_weight is None:
            return list(self.drafter.context_keys_values(context, positions))
        kv = product(self.context_rows(context), self.context_weight, self.context_bias)
        # One row would be compiled for itself, in the middle of serving.
        finish = self._finish if context.shape[0] > 1 else self._finish_context
        keys, values = finish(kv, positions)
        return list(zip(keys, values, strict=True))

    def _finish_context(self, kv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, T, kv_heads, head_dim] of projections of all layers."""
        drafter = self.drafter
        attentions = drafter.plain_attentions()
        first = attentions[0]
        kv = kv.view(kv.shape[0], len(attentions), 2, first.kv_heads, first.head_dim)
        key, value = kv.unbind(2)
        tables = drafter.rotary.tables(positions[:, None], kv.dtype)
        keys = [a.key_norm(key[:, index]) for index, a in enumerate(attentions)]
        key = drafter.rotary.rotate(torch.stack(keys, dim=1), tables)
        if first.value_scale is not None:
            value = value * first.value_scale
        return key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [T, target vocabulary]; what the draft vocabulary lacks is -inf."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        if logits is None:
            return None
        logits = self.drafter.scale_logits(logits)
        if self._draft_columns is not None:
            full = logits.new_full((logits.shape[0], self.vocab_size), float("-inf"))
            return full.index_copy_(1, self._draft_columns, logits)
        missing = self.vocab_size - logits.shape[-1]
        if missing > 0:
            return F.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self.vocab_size]

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """The likeliest token ids int64 [T]; vLLM's name of ``top_tokens``."""
        return self.top_tokens(hidden_states)

    def best_choice(self, hidden_states: Tensor) -> HeadChoice | None:
        """The likeliest draft of each row with its normalizer, or None where logits are needed.

        Args:
            hidden_states: [T, hidden].
        """
        return None if self.gather is not None else self.shard_choice(hidden_states)

    def shard_logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, rows] over this rank's rows of the head, padding left out."""
        head = cast(Any, self.drafter.head())
        logits: Tensor = head.quant_method.apply(head, hidden, bias=None)
        return logits[:, : self.shard_rows()]

    def get_draft_kv_cache_layer_names(self) -> list[str]:
        """Names of vLLM's layers, in the drafter's order; a draft layer may be several."""
        return [page.layer_name for attention in self._attentions() for page in attention]

    def get_draft_attn_causal(self) -> list[bool]:
        """Whether the block rows of each of them are kept from later rows."""
        layers = zip(self._attentions(), self.spec.config.layers, strict=True)
        return [layer.causal for attention, layer in layers for _ in attention]

    def _attentions(self) -> list[PagedAttention]:
        """The attention of each draft layer."""
        return [cast(PagedAttention, attention) for attention in self.model.attentions]


def _window(layer: LayerAttention, window_from: str) -> int | None:
    """The window in vLLM's convention, the row itself included; see ``serving.engine_drafter``."""
    if layer.sliding_window is None:
        return None
    return layer.sliding_window + (window_from == "anchor")
