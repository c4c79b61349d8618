"""Recurrent layers of a target: their states by request, taken back after rejected drafts.

A recurrent or convolution state cannot forget its last tokens as keys and values can. A verify
pass therefore works on copies of the states and keeps what went into each recurrent module. Once
it is known how many tokens each request commits, those modules alone, not the whole target, run
again over the committed tokens, from the states before the pass. Requests that commit equally many
share such a run, because a recurrent module would take padding for tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from dflash_plugin.transformers.static_cache import StaticCache, TargetPass

# A state's attribute of Transformers' cache layer, and its number there or None for the only one.
StateKey = tuple[str, int | None]
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
ATTRIBUTES = "conv_states", "recurrent_states"


def is_recurrent(layer: Any) -> bool:
    """Whether a layer of Transformers' cache holds a state, perhaps beside keys and values."""
    return hasattr(layer, "recurrent_states")


class RecurrentStates:
    """The states of all requests, and the last pass until it is known what it commits.

    Args:
        model: the target.
        layers: those of a Transformers cache that a pass of ``model`` has filled.
        rows: requests that the buffers hold.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Any], rows: int) -> None:
        self.model = model
        self.config = model.config
        self.filled = list(layers)
        self.mixers: list[nn.Module] = []
        self.buffers: dict[int, dict[StateKey, Tensor]] = {
            index: {
                key: state.new_zeros(rows, *state.shape[1:])
                for key, state in _states(layer).items()
            }
            for index, layer in enumerate(layers)
            if is_recurrent(layer)
        }
        self._cache: StaticCache | None = None
        self._calls: list[Call] = []

    def cache(self, target_pass: TargetPass) -> StaticCache:
        """A cache for one pass: new states at the start of requests, else copies of theirs."""
        if target_pass.is_start:
            return StaticCache(target_pass, DynamicCache(config=self.config).layers)
        layers = list(self.filled)
        for index, buffers in self.buffers.items():
            layers[index] = _with_states(
                layers[index],
                {key: _rows_of(buffer, target_pass) for key, buffer in buffers.items()},
            )
        return StaticCache(target_pass, layers)

    @contextmanager
    def passing(self, target_pass: TargetPass) -> Iterator[StaticCache]:
        """Run a pass with the cache that this gives, to be ended by ``advance``."""
        cache, calls = self.cache(target_pass), []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((module, args, kwargs))

        handles = [
            mixer.register_forward_pre_hook(record, with_kwargs=True) for mixer in self.mixers
        ]
        try:
            yield cache
        finally:
            for handle in handles:
                handle.remove()
        self._cache, self._calls = cache, calls

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first tokens of each request of the last pass.

        Args:
            counts: tokens of each batch row; 0 leaves a row's state as it was before the pass.
        """
        assert self._cache is not None
        cache, step = self._cache, self._cache.target_pass
        self._cache = None
        by_count: dict[int, list[int]] = {}
        for row, count in enumerate(counts):
            if count:
                by_count.setdefault(count, []).append(row)
        for count, chosen in by_count.items():
            index = torch.as_tensor(chosen, device=step.positions.device)
            if count == step.positions.shape[1]:
                self._store(cache, index if step.rows is None else step.rows[index], index)
            else:
                self._replay(index, count, step)

    def _replay(self, index: Tensor, count: int, step: TargetPass) -> None:
        """Run the recurrent modules again over the first ``count`` tokens of batch rows [N]."""
        rows = index if step.rows is None else step.rows[index]
        replayed = TargetPass(step.kv, step.positions[index, :count], step.num_keys, rows)
        cache = self.cache(replayed)
        shape = step.positions.shape

        def part(value: Any) -> Any:
            if isinstance(value, StaticCache):
                return cache
            if isinstance(value, TargetPass):
                return replayed
            if isinstance(value, Tensor) and value.shape[:2] == shape:
                return value[index, :count]
            if isinstance(value, tuple):
                return tuple(map(part, value))
            return value

        for module, args, kwargs in self._calls:
            module(*map(part, args), **{name: part(value) for name, value in kwargs.items()})
        self._store(cache, rows, None)

    def _store(self, cache: StaticCache, rows: Tensor, index: Tensor | None) -> None:
        for layer, buffers in self.buffers.items():
            for key, state in _states(cache.layers[layer]).items():
                buffers[key][rows] = state if index is None else state[index]

    def move_row(self, source: int, destination: int) -> None:
        """Copy one request's states to another row, when a batch is compacted."""
        for buffers in self.buffers.values():
            for buffer in buffers.values():
                buffer[destination].copy_(buffer[source])


class MixerSearch(StaticCache):
    """A cache that notes which module of a model updates each state.

    Args:
        cache: of a pass that is about to run.
        model: runs it.
    """

    def __init__(self, cache: StaticCache, model: PreTrainedModel) -> None:
        super().__init__(cache.target_pass, cache.layers)
        self.model = model
        self.found: list[nn.Module] = []
        self._running: list[nn.Module] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the modules of the passes that run in the block, in ``found``."""
        handles: list[Any] = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _note(self) -> None:
        if self._running[-1] not in self.found:
            self.found.append(self._running[-1])

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As a cache does, and note the module that runs."""
        self._note()
        state: Tensor = super().update_conv_state(*args, **kwargs)
        return state

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As a cache does, and note the module that runs."""
        self._note()
        state: Tensor = super().update_recurrent_state(*args, **kwargs)
        return state


def _states(layer: Any) -> dict[StateKey, Tensor]:
    """The states that a cache layer holds; releases before 5.19 have one of each kind."""
    found: dict[StateKey, Tensor] = {}
    for attribute in ATTRIBUTES:
        held = getattr(layer, attribute)
        numbered = held.items() if isinstance(held, dict) else [(None, held)]
        found |= {(attribute, key): state for key, state in numbered if state is not None}
    return found


def _with_states(layer: Any, states: dict[StateKey, Tensor]) -> Any:
    """A copy of a filled cache layer that holds other states."""
    other = copy.copy(layer)
    for attribute in ATTRIBUTES:
        held = getattr(layer, attribute)
        given = {key: state for (name, key), state in states.items() if name == attribute}
        if given:
            setattr(other, attribute, {**held, **given} if isinstance(held, dict) else given[None])
    return other


def _rows_of(buffer: Tensor, target_pass: TargetPass) -> Tensor:
    """A copy of the buffer's rows that belong to a pass."""
    if target_pass.rows is None:
        return buffer[: target_pass.batch].clone()
    return buffer[target_pass.rows]
