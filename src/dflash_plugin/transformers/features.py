"""Context features of a target: the outputs of a few of its layers, taken by forward hooks.

``output_hidden_states=True`` keeps the output of every layer alive until the pass ends: 2.5 GB for
a prefill chunk of 8,192 tokens of a target with 36 layers of 4,096 in bfloat16. A drafter reads
three to five of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dflash_plugin.drafter.target_features import decoder_layers
from dflash_plugin.errors import DFlashError


class FeatureTap:
    """Takes the outputs of ``layer_ids`` from forward passes of a model.

    Ids count as Transformers' ``hidden_states`` less one: -1 is the first layer's input, and the
    last layer's output is what the model returns after its final norm.

    Args:
        model: the target.
        layer_ids: in the order of the features.
        layers: the decoder layers, or None to ask the model for all hidden states.
        last_normed: take the last layer's output after the final norm, else before it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer_ids: tuple[int, ...],
        layers: nn.ModuleList | None,
        last_normed: bool = True,
    ) -> None:
        self.layer_ids = layer_ids
        self.last_normed = last_normed
        self.decoder = _decoder(model)
        self.layers = layers

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        layer_ids: tuple[int, ...],
        probe: Callable[[], Any],
        last_normed: bool = True,
    ) -> FeatureTap:
        """A tap with hooks if they give exactly what the model itself gives.

        Args:
            model: the target.
            layer_ids: as above.
            probe: runs the model on two tokens with ``output_hidden_states=True``.
            last_normed: as above.

        Raises:
            DFlashError: a layer gives no output, or not one hidden state a token, or the last layer
                is to be taken before the final norm, and only hidden states can be had.
        """
        layers = decoder_layers(model)
        last = model.config.get_text_config().num_hidden_layers - 1
        before_norm = {last} & set(layer_ids) if not last_normed else set()
        tap = cls(model, layer_ids, layers, last_normed)
        with tap.recording() as recorded:
            out = probe()
        _require_outputs(model, layer_ids, out.hidden_states)
        # What the last layer gives before the norm is no hidden state to compare it with.
        compared = [i for i in layer_ids if i not in before_norm]
        expected = [out.hidden_states[i + 1] for i in compared]
        found = [recorded.outputs.get(i) for i in compared]
        agrees = all(
            one is not None and torch.equal(one, other)
            for one, other in zip(found, expected, strict=True)
        )
        if layers is not None and agrees:
            return tap
        _require_hooks(model, before_norm)
        return cls(model, layer_ids, None)

    @contextmanager
    def recording(self) -> Iterator[Recorded]:
        """Record the passes that run in the block; each replaces what the one before left."""
        recorded = Recorded(self.layer_ids, asks_for_all=self.layers is None)
        handles = [] if self.layers is None else self._hooks(self.layers, recorded.outputs)
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, layers: nn.ModuleList, outputs: dict[int, Tensor]) -> list[Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outputs[-1] = args[0] if args else kwargs["hidden_states"]

        def after(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs[index] = output if isinstance(output, Tensor) else output[0]

            return hook

        handles: list[Any] = []
        for index in self.layer_ids:
            if index == -1:
                handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
            else:
                is_normed = self.last_normed and index == len(layers) - 1
                module = self.decoder if is_normed else layers[index]
                handles.append(module.register_forward_hook(after(index)))
        return handles


class Recorded:
    """What one pass left.

    Attributes:
        outputs: by layer id, each [B, T, hidden].
        asks_for_all: whether the pass has to return all hidden states, for want of hooks.
    """

    def __init__(self, layer_ids: tuple[int, ...], asks_for_all: bool) -> None:
        self.layer_ids = layer_ids
        self.outputs: dict[int, Tensor] = {}
        self.asks_for_all = asks_for_all

    def features(self, out: Any) -> Tensor:
        """Features [B, T, len(layer_ids) * hidden] of the pass that returned ``out``."""
        if self.asks_for_all:
            return torch.cat([out.hidden_states[i + 1] for i in self.layer_ids], dim=-1)
        return torch.cat([self.outputs[i] for i in self.layer_ids], dim=-1)


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder: nn.Module = model.get_decoder()
    return decoder


def _require_outputs(
    model: PreTrainedModel, layer_ids: tuple[int, ...], hidden_states: Sequence[Tensor]
) -> None:
    """Each layer must give one hidden state a token, over the two tokens of a probe."""
    name, count = type(model).__name__, len(hidden_states) - 1
    if max(layer_ids) >= count:
        raise DFlashError(
            f"the drafter reads layer {max(layer_ids)} of the target, and {name} gives the outputs "
            f"of {count} layers: it runs without a drafter alone"
        )
    hidden = model.config.get_text_config().hidden_size
    for layer in layer_ids:
        shape = list(hidden_states[layer + 1].shape)
        if shape[1:] != [2, hidden]:
            raise DFlashError(
                f"layers of the target {name} give outputs of shape {shape} instead of one hidden "
                f"state of {hidden} a token: it runs without a drafter alone"
            )


def _require_hooks(model: PreTrainedModel, before_norm: set[int]) -> None:
    if before_norm:
        raise DFlashError(
            f"the drafter reads target layer {max(before_norm)}, the last, before the final norm, "
            f"and {type(model).__name__} does not give it: use a serving engine"
        )
