"""Targets that SGLang does not serve with DFlash, with stand-ins for its models."""

from __future__ import annotations

import pytest
from torch import nn

from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang.target_layers import METHOD, enable


class Inner(nn.Module):
    """Keeps the inputs of these layers."""

    layers_to_capture: tuple[int, ...] | list[int] = ()


class KeepsInputs(nn.Module):
    """As GLM 4: the code, and no method."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()
        self.capture_aux_hidden_states = False


class ForEagle(KeepsInputs):
    """As Qwen2: a method of another name."""

    def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None:
        assert layer_ids is not None
        self.capture_aux_hidden_states = True
        self.model.layers_to_capture = [layer + 1 for layer in layer_ids]


class Gemma3ForCausalLM(ForEagle):
    """Has the method, and leaves out the residual."""


class OfText(KeepsInputs):
    """As Qwen3-VL: a method that calls one which its text model lacks."""

    def set_dflash_layers_to_capture(self, layer_ids: list[int]) -> None:
        self.capture_aux_hidden_states = True
        self.model.set_dflash_layers_to_capture([layer + 1 for layer in layer_ids])


class Qwen3_5ForCausalLM(OfText):
    """As in SGLang 0.5.20: tells its layers the ones that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.model.set_dflash_layers_to_capture = self.keep

    def keep(self, layers: list[int]) -> None:
        self.model.layers_to_capture = layers

    def set_dflash_layers_to_capture(self, layer_ids: list[int]) -> None:
        self.keep(layer_ids)


@pytest.mark.parametrize(
    ("kind", "lacked"),
    [(KeepsInputs, True), (ForEagle, True), (OfText, False), (Qwen3_5ForCausalLM, False)],
)
def test_a_target_keeps_what_goes_into_the_layer_behind(kind, lacked):
    target = kind()
    assert enable(target) == lacked
    getattr(target, METHOD)([0, 2])
    assert target.model.layers_to_capture == [1, 3]
    assert target.capture_aux_hidden_states


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear(2, 2), "Linear does not give the outputs"),
        (Gemma3ForCausalLM(), "Gemma3ForCausalLM gives .* without the residual"),
    ],
)
def test_a_target_that_gives_no_whole_outputs_is_refused(target, message):
    with pytest.raises(DFlashError, match=message + r".* serve this target with vLLM"):
        enable(target)
    assert not hasattr(target, METHOD)
