"""Which layers' outputs a target keeps, of targets that SGLang itself does not serve with DFlash.

SGLang tells a target its layers by a method that only some models have. Others keep the same
outputs for EAGLE 3, or have the code for it and no method.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang import surface

METHOD = "set_dflash_layers_to_capture"
# Models that keep layers' outputs without the residual.
WITHOUT_RESIDUAL = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
# Models that keep inputs of layers. SGLang 0.5.20 tells them the layers themselves, so that they
# keep the outputs of the layers before.
TOLD_OUTPUTS = ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")


def enable(target: nn.Module) -> bool:
    """Give a target the method that SGLang calls, where it lacks it and keeps outputs.

    Args:
        target: SGLang's model, before its attention back ends are made.

    Returns:
        Whether it lacked the method.

    Raises:
        DFlashError: the model keeps no layers' outputs, or not whole ones.
    """
    stack = surface.layer_stack(target)
    if stack is not None and surface.method_of(stack, METHOD) is None:
        # Qwen3-VL's own method calls it.
        setattr(stack, METHOD, partial(setattr, stack, "layers_to_capture"))
    name, lacked = type(target).__name__, surface.method_of(target, METHOD) is None
    if name in TOLD_OUTPUTS and surface.can_return_layers(target):
        setattr(target, METHOD, partial(_tell, target))
        return lacked
    if not lacked:
        return False
    if name in WITHOUT_RESIDUAL:
        raise DFlashError(
            f"SGLang's {name} gives the outputs of its layers without the residual, so that a "
            "DFlash drafter would read other values than it was trained on: serve this target "
            "with vLLM or the Transformers engine"
        )
    setter = surface.method_of(target, "set_eagle3_layers_to_capture")
    if setter is None and stack is not None and surface.can_return_layers(target):
        setter = partial(_keep, target)
    if setter is None:
        raise DFlashError(
            f"SGLang's {name} does not give the outputs of its layers, which a DFlash drafter "
            "reads: serve this target with vLLM or the Transformers engine"
        )
    setattr(target, METHOD, setter)
    return True


def _keep(model: Any, layer_ids: list[int]) -> None:
    """Let a model keep the outputs of layers: the inputs of the layers behind them."""
    model.capture_aux_hidden_states = True
    model.model.layers_to_capture = [layer + 1 for layer in layer_ids]


def _tell(model: Any, layer_ids: list[int]) -> None:
    """Let a model's layers keep the outputs of layers: the inputs of the layers behind them."""
    model.capture_aux_hidden_states = True
    model.model.set_dflash_layers_to_capture([layer + 1 for layer in layer_ids])
