"""Context features of a target: the outputs of a few of its layers, taken by forward hooks.

``output_hidden_states=True`` keeps the output of every layer alive until the pass ends: 2.5 GB for
a prefill chunk of 8,192 tokens of a target with 36 layers of 4,096 in bfloat16. A drafter reads
three to five of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class FeatureTap:
    """Takes the outputs of ``layer_ids`` from forward passes of a model.

    Ids count as Transformers' ``hidden_states`` less one: -1 is the first layer's input, and the
    last layer's output is what the model returns after its final norm.

    Args:
        model: the target.
        layer_ids: in the order of the features.
        layers: the decoder layers, or None to ask the model for all hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, layer_ids: tuple[int, ...], layers: nn.ModuleList | None
    ) -> None:
        self.layer_ids = layer_ids
        self.decoder = _decoder(model)
        self.layers = layers

    @classmethod
    def of(
        cls, model: PreTrainedModel, layer_ids: tuple[int, ...], probe: Callable[[], Any]
    ) -> FeatureTap:
        """A tap with hooks if they give exactly what the model itself gives.

        Args:
            model: the target.
            layer_ids: as above.
            probe: runs the model on some tokens with ``output_hidden_states=True``.
        """
        layers = _decoder_layers(model)
        if layers is None:
            return cls(model, layer_ids, None)
        tap = cls(model, layer_ids, layers)
        with tap.recording() as recorded:
            out = probe()
        expected = [out.hidden_states[i + 1] for i in layer_ids]
        found = [recorded.outputs.get(i) for i in layer_ids]
        agrees = all(
            one is not None and torch.equal(one, other)
            for one, other in zip(found, expected, strict=True)
        )
        return tap if agrees else cls(model, layer_ids, None)

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
                is_last = index == len(layers) - 1
                module = self.decoder if is_last else layers[index]
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


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list of decoder layers, or None where the model has no single list of that length."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        child
        for child in _decoder(model).children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    return lists[0] if len(lists) == 1 else None
