"""A Transformers causal language model over static key/value buffers with a position per row."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from dflash_plugin.drafter.static_kv import KVShape, StaticKV
from dflash_plugin.errors import DFlashError, reason
from dflash_plugin.transformers.features import FeatureTap
from dflash_plugin.transformers.positions import has_alibi, position_limit
from dflash_plugin.transformers.recurrent import MixerSearch, RecurrentStates, is_recurrent
from dflash_plugin.transformers.start_check import check_start, own_logits
from dflash_plugin.transformers.static_cache import ATTENTION, StaticCache, TargetPass


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
        DFlashError: the model keeps a state that cannot be taken back, or attends in a way that the
            static attention does not cover.
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
        self.num_positions = position_limit(self.config)
        self._features: FeatureTap | None = None
        self.recurrent: RecurrentStates | None = None
        try:
            if has_alibi(self.config):
                raise ValueError("ALiBi biases its scores by distance")
            layers = self._probe_layers()
            expected = own_logits(model)
            model.set_attn_implementation(ATTENTION)
            shapes = [self._shape(index, layer) for index, layer in enumerate(layers)]
            self.has_attention = any(shape.heads for shape in shapes)
            self.kv = StaticKV(shapes, rows, length, self.dtype, self.device)
            if any(map(is_recurrent, layers)):
                self.recurrent = RecurrentStates(model, layers, rows)
                self.recurrent.mixers = self._find_mixers(self.recurrent)
            if self.has_attention:
                self._check_windows()
            check_start(self, expected)
        except DFlashError:
            raise
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
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
            target_pass: positions and buffers of this pass; ``advance`` ends it.
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

    @torch.inference_mode()
    def advance(self, counts: Sequence[int]) -> None:
        """Commit tokens of the last pass; where all state is keys and values, nothing is to do.

        Args:
            counts: of each batch row, tokens from the first on.
        """
        if self.recurrent is not None:
            self.recurrent.advance(counts)

    def move_row(self, source: int, destination: int) -> None:
        """Copy one request's state to another row, when a batch is compacted."""
        self.kv.move_row(source, destination)
        if self.recurrent is not None:
            self.recurrent.move_row(source, destination)

    def _run(
        self,
        tokens: Tensor,
        target_pass: TargetPass,
        logits_at: Tensor | int = 0,
        output_hidden_states: bool = False,
    ) -> Any:
        def run(cache: StaticCache) -> Any:
            return self._call(tokens, cache, logits_at, output_hidden_states)

        if self.recurrent is None:
            return run(StaticCache(target_pass))
        with self.recurrent.passing(target_pass) as cache:
            return run(cache)

    def _call(
        self,
        tokens: Tensor,
        cache: StaticCache,
        logits_at: Tensor | int = 0,
        output_hidden_states: bool = False,
    ) -> Any:
        target_pass = cache.target_pass
        positions = target_pass.positions
        if self.num_positions is not None:
            # Drafts beyond the last position are never committed; a table has no row for them.
            positions = positions.clamp(max=self.num_positions - 1)
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=target_pass.mask(None)[:, None] if self.has_attention else None,
            use_cache=True,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_at,
            target_pass=target_pass,
            **{self._cache_name: cache},
        )

    @torch.inference_mode()
    def _probe(self) -> Any:
        """A pass over two padding tokens with all hidden states; it writes to scratch alone."""
        tokens = torch.arange(2, device=self.device)[None]
        return self._run(
            tokens, TargetPass(self.kv, torch.full_like(tokens, -1), 1), output_hidden_states=True
        )

    @torch.inference_mode()
    def _probe_layers(self) -> Sequence[Any]:
        """The layers of Transformers' own cache, after a pass over one token."""
        cache = DynamicCache(config=self.config)
        self.model(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device),
            use_cache=True,
            **{self._cache_name: cache},
        )
        layers: Sequence[Any] = cache.layers
        return layers

    def _shape(self, index: int, layer: Any) -> KVShape:
        """Of the keys and values that a cache layer holds: no heads where it has none."""
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if hasattr(layer, "update_indexer"):
            raise DFlashError(
                f"layer {index} of the target {self.config.model_type!r} chooses its keys by an "
                "index of its own (sparse attention), which the Transformers engine does not keep: "
                "serve it with vLLM or SGLang"
            )
        if keys is not None and values is not None:
            return KVShape(keys.shape[1], keys.shape[-1], values.shape[-1])
        is_stateless = keys is None and getattr(layer, "is_initialized", False)
        if is_recurrent(layer) or is_stateless:
            return KVShape(0, 0, 0)
        raise DFlashError(
            f"layer {index} of the target {self.config.model_type!r} keeps a state "
            f"({type(layer).__name__}) other than attention keys and values, which cannot "
            "roll back rejected tokens: the Transformers engine cannot run this target"
        )

    @torch.inference_mode()
    def _find_mixers(self, recurrent: RecurrentStates) -> list[nn.Module]:
        """The modules that update the recurrent states."""
        tokens = torch.arange(2, device=self.device)[None]
        step = TargetPass(self.kv, torch.full_like(tokens, -1), 1, is_start=True)
        search = MixerSearch(recurrent.cache(step), self.model)
        with search.watching():
            self._call(tokens, search)
        return search.found

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
