"""A Transformers causal language model over static key/value buffers with a position per row.

Two public seams of Transformers carry it: a ``Cache`` whose ``update`` writes into ``StaticKV``,
and an attention function that takes its mask from the pass at hand. Both work for any decoder-only
model that hands its keyword arguments down to its attention, as Transformers' models do.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dflash_plugin.drafter.attention import masked_attention
from dflash_plugin.drafter.static_kv import KVShape, StaticKV
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.transformers.features import FeatureTap

# Transformers takes any name with "flash" in it for a Flash Attention kernel.
ATTENTION = "static_kv"


class TargetPass:
    """One forward pass: which rows and positions it writes, and what its queries see.

    Args:
        kv: the buffers.
        positions: int64 [B, T]; rows below zero are padding and go to scratch.
        num_keys: slots that the queries look at; covers every position of the pass.
        rows: int64 [B], buffer row of each batch row, or None for 0..B-1.
    """

    def __init__(
        self, kv: StaticKV, positions: Tensor, num_keys: int, rows: Tensor | None = None
    ) -> None:
        self.kv = kv
        self.rows = rows
        self.num_keys = num_keys
        self.batch = positions.shape[0]
        self.slots = kv.flat_slots(positions, rows)
        self.positions = positions.clamp(min=0)
        self.windows: dict[int, int | None] = {}
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """Causal visibility bool [B, T, num_keys], within ``window`` positions if given."""
        if window not in self._masks:
            query = self.positions[:, :, None]
            key = torch.arange(self.num_keys, device=query.device)
            visible = key <= query
            if window is not None:
                visible = visible & (query - key < window)
            self._masks[window] = visible
        return self._masks[window]


class _StaticCache(Cache):  # type: ignore[misc] # Transformers has no stubs
    """Cache over ``StaticKV``: stores a pass's keys and values and returns all that it may see."""

    def __init__(self, target_pass: TargetPass) -> None:
        super().__init__(layers=[])
        self.target_pass = target_pass

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        step = self.target_pass
        step.kv.write(
            layer_idx, key_states.transpose(1, 2), value_states.transpose(1, 2), step.slots
        )
        return step.kv.read(layer_idx, step.batch, step.num_keys, step.rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _static_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    target_pass: TargetPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if target_pass is None and softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scale,
            sliding_window=sliding_window,
            **kwargs,
        )
        return out, None
    if target_pass is None:
        mask = _visible(attention_mask, query, key)
    else:
        target_pass.windows[int(getattr(module, "layer_idx", -1))] = sliding_window
        mask = target_pass.mask(sliding_window)
    out = masked_attention(query, key, value, mask, scale, s_aux, softcap)
    return out.transpose(1, 2), None


def _visible(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """bool [B, T, L] of a pass outside the engine, where None means a causal mask."""
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if attention_mask is not None:
        visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        return visible[:, 0].expand(batch, -1, -1)
    slots = torch.arange(keys, device=query.device)
    return (slots <= slots[keys - rows :, None]).expand(batch, -1, -1)


AttentionInterface.register(ATTENTION, _static_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def cache_argument(model: PreTrainedModel) -> str:
    """Name of the forward's cache argument: ``cache``, in older releases ``past_key_values``."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class Target:
    """The target model, run over its static buffers.

    Args:
        model: a causal language model; its attention is replaced.
        rows: requests that the buffers hold.
        length: positions of each request.
        layer_ids: layers whose outputs each pass returns as context features, as
            ``DrafterConfig.target_layer_ids`` counts them.
        last_normed: give the last layer's output after the final norm, else before it.

    Raises:
        DFlashError: the model keeps state other than attention keys and values, which cannot roll
            back, or attends in a way that the static attention does not cover.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        length: int,
        layer_ids: tuple[int, ...] = (),
        last_normed: bool = True,
    ) -> None:
        self.model = model
        self.layer_ids = layer_ids
        self._cache_name = cache_argument(model)
        self.config = model.config.get_text_config()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        if getattr(self.config, "attention_chunk_size", None):
            raise DFlashError(
                f"the target {self.config.model_type!r} has attention_chunk_size "
                f"{self.config.attention_chunk_size}: the Transformers engine has no chunked "
                "attention, serve it with vLLM or SGLang"
            )
        self._features: FeatureTap | None = None
        try:
            shapes = self._probe_shapes()
            model.set_attn_implementation(ATTENTION)
            self.kv = StaticKV(shapes, rows, length, self.dtype, self.device)
            self._check_windows()
        except DFlashError:
            raise
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise DFlashError(
                f"the target {self.config.model_type!r} does not run over this engine's cache and "
                f"attention ({reason(error)}): serve it with vLLM or SGLang"
            ) from error
        if layer_ids:
            self._features = FeatureTap.of(model, layer_ids, self._probe, last_normed)

    @property
    def embedding(self) -> Tensor:
        """Input embedding weight [vocab, hidden]."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        target_pass: TargetPass,
        logits_at: Tensor | int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the target on [B, T] tokens.

        Args:
            tokens: int64 [B, T].
            target_pass: positions and buffers of this pass.
            logits_at: Transformers' ``logits_to_keep``: 0 for all positions, or columns int64 [C].

        Returns:
            Logits [B, C, vocab], and features [B, T, len(layer_ids) * hidden], or None without
            ``layer_ids``.
        """
        if self._features is None:
            return self._run(tokens, target_pass, logits_at).logits, None
        with self._features.recording() as recorded:
            out = self._run(tokens, target_pass, logits_at, recorded.asks_for_all)
        return out.logits, recorded.features(out)

    def _run(
        self,
        tokens: Tensor,
        target_pass: TargetPass,
        logits_at: Tensor | int = 0,
        output_hidden_states: bool = False,
    ) -> Any:
        cache = {self._cache_name: _StaticCache(target_pass)}
        return self.model(
            input_ids=tokens,
            position_ids=target_pass.positions,
            attention_mask=target_pass.mask(None)[:, None],
            use_cache=True,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_at,
            target_pass=target_pass,
            **cache,
        )

    @torch.inference_mode()
    def _probe(self) -> Any:
        """A pass over two padding tokens with all hidden states; it writes to scratch alone."""
        tokens = torch.arange(2, device=self.device)[None]
        return self._run(
            tokens, TargetPass(self.kv, torch.full_like(tokens, -1), 1), output_hidden_states=True
        )

    @torch.inference_mode()
    def _probe_shapes(self) -> list[KVShape]:
        cache = DynamicCache(config=self.config)
        self.model(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device),
            use_cache=True,
            **{self._cache_name: cache},
        )
        shapes = []
        for index, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or hasattr(layer, "recurrent_states"):
                raise DFlashError(
                    f"layer {index} of the target {self.config.model_type!r} keeps a state "
                    f"({type(layer).__name__}) other than attention keys and values, which cannot "
                    "roll back rejected tokens: the Transformers engine cannot run this target"
                )
            shapes.append(KVShape(keys.shape[1], keys.shape[-1], values.shape[-1]))
        return shapes

    def _check_windows(self) -> None:
        """Every layer that the configuration calls sliding must have reported its window."""
        step = TargetPass(self.kv, torch.zeros(1, 1, dtype=torch.int64, device=self.device), 1)
        self.forward(step.positions, step)
        if not step.windows:
            raise DFlashError(
                f"the target {self.config.model_type!r} does not pass keyword arguments on to its "
                "attention, so the Transformers engine cannot run it"
            )
        layer_types = getattr(self.config, "layer_types", None) or []
        declared = sum(kind == "sliding_attention" for kind in layer_types)
        reported = sum(window is not None for window in step.windows.values())
        if layer_types and declared != reported:
            raise DFlashError(
                f"the target {self.config.model_type!r} declares {declared} sliding-window layers "
                f"but {reported} gave a window to their attention: the Transformers engine would "
                "compute something else than the model does"
            )
