"""The last layer's output, with stand-ins for SGLang's target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang.last_layer import add_last_layer, captured_layers, check
from tests.helpers.layouts import LAGUNA
from tests.helpers.tiny import tiny_config

LAST = {"target_layer_ids": (3, 1)}
BEHIND, BEFORE = tiny_config(**LAST), tiny_config(**LAST, **LAGUNA)


def target_of(kind: str) -> Any:
    return SimpleNamespace(num_hidden_layers=4, model_type=kind)


@pytest.mark.parametrize(
    ("config", "kind", "captured"),
    [
        (tiny_config(target_layer_ids=(2, 0)), "llama", [0, 2]),
        (BEHIND, "llama", [1]),
        (BEHIND, "laguna", [1]),
        (BEFORE, "llama", [1]),
        (BEFORE, "laguna", [1, 3]),
        # Muse's targets capture what goes into a layer.
        (tiny_config(target_layer_ids=(2, 0)), "muse_glimmer", [1, 3]),
        (BEHIND, "muse_glimmer_text", [2]),
    ],
)
def test_layers_that_sglang_captures(config, kind, captured):
    assert captured_layers(config, target_of(kind)) == captured


def test_what_graphs_cannot_take_is_refused():
    for is_eager in (True, False):
        check(BEHIND, target_of("llama"), lambda is_eager=is_eager: is_eager)
        check(BEFORE, target_of("laguna"), lambda is_eager=is_eager: is_eager)
    check(BEFORE, target_of("llama"), lambda: True)
    with pytest.raises(DFlashError, match=r"layer 3, the last, before .* --disable-cuda-graph"):
        check(BEFORE, target_of("llama"), lambda: False)


class LogitsProcessor(nn.Module):
    """Gives what it is given."""

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        lm_head: Any,
        logits_metadata: Any,
        aux_hidden_states: Any = None,
        hidden_states_before_norm: Any = None,
    ) -> Any:
        return aux_hidden_states, hidden_states_before_norm


class Norm(nn.Module):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        normed = (x if residual is None else x + residual) * 10
        x.mul_(0.0)
        return normed


class Target(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.norm = Norm()
        self.logits_processor = LogitsProcessor()

    def forward(self, hidden: Tensor, residual: Tensor | None, captured: Any, named: bool) -> Any:
        given = torch.zeros(2), self.model.norm(hidden, residual), None, None
        if named:
            return self.logits_processor(
                *given, aux_hidden_states=captured, hidden_states_before_norm=7
            )
        return self.logits_processor(*given, captured, 7)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("residual", [torch.full((2, 3), 2.0), None])
@pytest.mark.parametrize("config", [BEHIND, BEFORE], ids=["behind", "before"])
def test_the_last_layer_stands_behind_the_others(config, residual, named):
    target = Target()
    add_last_layer(target, config)
    first = torch.zeros(2, 3)
    before = torch.full((2, 3), 1.0 if residual is None else 3.0)
    wanted = before if config is BEFORE else before * 10
    (one, last), rest = target(torch.ones(2, 3), residual, [first], named)
    assert torch.equal(one, first)
    assert torch.equal(last, wanted)
    assert rest == 7
    packed, _ = target(torch.ones(2, 3), residual, first, named)
    assert torch.equal(packed, torch.cat([first, wanted], dim=-1))
    # A pass that captures nothing is left alone.
    assert target(torch.ones(2, 3), residual, None, named) == (None, 7)


def test_a_target_that_does_not_give_it_is_refused_by_name():
    with pytest.raises(DFlashError, match="Linear has 0 modules of the class LogitsProcessor"):
        add_last_layer(nn.Linear(2, 2), BEHIND)
    target = Target()
    del target.model.norm
    with pytest.raises(DFlashError, match="Target has no norm"):
        add_last_layer(target, BEFORE)
