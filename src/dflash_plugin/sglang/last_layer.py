"""The output of the target's last layer, which most of SGLang's models do not capture.

They capture a layer's output where the next layer reads it. What the model gives its logits
processor is the last layer's output after the final norm, so a hook on the processor adds that to
the captured outputs; under CUDA graphs and torch.compile too, as the processor's inputs are what
the pass made. The output before the norm is never handed on. A hook on the norm takes it, which
only passes see that run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang import surface

# Targets that capture their last layer's output, before the norm.
CAPTURES_LAST = ("laguna",)
# These count the layers' inputs.
COUNTS_INPUTS = "muse_glimmer"
OFF = "or set DFLASH_PLUGIN=off to use SGLang's own DFlash"


def captured_layers(config: DrafterConfig, target: Any) -> list[int]:
    """The layers that SGLang captures for a drafter, ascending and as this target counts them.

    Args:
        config: of the drafter.
        target: the target's text configuration.
    """
    layers, kind = sorted(config.target_layer_ids), surface.model_type(target)
    is_captured = not config.last_layer_normed and kind in CAPTURES_LAST
    if layers[-1] == target.num_hidden_layers - 1 and not is_captured:
        layers.pop()
    shift = kind.startswith(COUNTS_INPUTS)
    return [layer + shift for layer in layers]


def check(config: DrafterConfig, target: Any, runs_eagerly: Callable[[], bool]) -> None:
    """Check that the last layer's output can be had, where a drafter reads it.

    Args:
        config: of the drafter.
        target: the target's text configuration.
        runs_eagerly: whether the target runs without CUDA graphs and torch.compile.

    Raises:
        DFlashError: it cannot.
    """
    captured = captured_layers(config, target)
    last = target.num_hidden_layers - 1
    if len(captured) == len(config.target_layer_ids):
        return
    if not config.last_layer_normed and not runs_eagerly():
        raise DFlashError(
            f"the drafter reads target layer {last}, the last, before the final norm, which SGLang "
            f"gives only of {', '.join(CAPTURES_LAST)} targets or without CUDA graphs: set "
            f"--disable-cuda-graph, use vLLM, {OFF}"
        )


def add_last_layer(target: nn.Module, config: DrafterConfig) -> None:
    """Add the last layer's output to what a target captures, behind the other layers'.

    Args:
        target: SGLang's model; it captures all layers of the drafter but its last.
        config: of the drafter.

    Raises:
        DFlashError: the model has no logits processor, or no final norm.
    """
    processor = _module(target, "LogitsProcessor")
    if config.last_layer_normed:
        taken: list[Tensor] | None = None
    else:
        taken = []
        norm = surface.final_norm(target)
        if norm is None:
            raise DFlashError(
                f"the drafter reads the target's last layer before the final norm, and "
                f"{type(target).__name__} has no norm: use vLLM or the Transformers engine, {OFF}"
            )
        norm.register_forward_pre_hook(_taking(taken), with_kwargs=True)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = dict(zip(("input_ids", "hidden_states"), args[:2], strict=False)) | kwargs
        captured = args[4] if len(args) > 4 else kwargs.get("aux_hidden_states")
        if captured is None:
            return None
        last = found["hidden_states"] if taken is None else taken[-1]
        if isinstance(captured, Tensor):
            captured = torch.cat([captured, last], dim=-1)
        else:
            captured = [*captured, last]
        return args[:4], {**_named(args[5:]), **kwargs, "aux_hidden_states": captured}

    processor.register_forward_pre_hook(add, with_kwargs=True)


def _named(rest: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("hidden_states_before_norm",), rest, strict=False))


def _taking(taken: list[Tensor]) -> Any:
    """A hook that keeps what the final norm is given: hidden states, and a residual to add."""

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = args
        residual = rest[0] if rest else kwargs.get("residual")
        # The norm may write its result into its input.
        taken[:] = [hidden.clone() if residual is None else hidden + residual]

    return take


def _module(target: nn.Module, kind: str) -> nn.Module:
    found = [module for module in target.modules() if type(module).__name__ == kind]
    if len(found) != 1:
        raise DFlashError(
            f"the drafter reads the target's last layer, and {type(target).__name__} has "
            f"{len(found)} modules of the class {kind} to take its output from: use vLLM or the "
            f"Transformers engine, {OFF}"
        )
    return found[0]
