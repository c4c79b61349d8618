"""The target's pass: features taken by hooks equal the model's own hidden states."""

import warnings

import pytest
import torch

from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine, Request
from dflash_plugin.transformers.features import FeatureTap
from dflash_plugin.transformers.static_cache import TargetPass
from dflash_plugin.transformers.target import Target
from tests.helpers.tiny import tiny_drafter, tiny_target
from tests.transformers.test_engine import TARGETS

# The first layer's input, a layer inside, and the last, which comes after the final norm.
LAYER_IDS = (3, -1, 1)


def features_of(target: Target, tokens: torch.Tensor) -> torch.Tensor:
    """Features [B, T, 3 * hidden] of a first pass over ``tokens`` [B, T]."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    step = TargetPass(target.kv, positions, tokens.shape[1], is_start=True)
    features = target.forward(tokens, step)[1]
    assert features is not None
    return features


@torch.no_grad()
def expected_of(kind: str, tokens: torch.Tensor) -> torch.Tensor:
    """Features by Transformers' own hidden states."""
    model = tiny_target(kind, **TARGETS[kind])
    hidden = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    return torch.cat([hidden[index + 1] for index in LAYER_IDS], dim=-1)


@pytest.mark.parametrize("kind", TARGETS)
def test_features_are_the_models_hidden_states_and_no_others_are_kept(kind, monkeypatch):
    model = tiny_target(kind, **TARGETS[kind])
    target = Target(model, 2, 16, LAYER_IDS)
    assert target._features.layers is not None
    asked = []
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        asked.append(kwargs.get("output_hidden_states"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", watched.__get__(model))
    tokens = torch.randint(4, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    found = features_of(target, tokens)
    torch.testing.assert_close(found, expected_of(kind, tokens), atol=1e-4, rtol=1e-4)
    assert asked == [False]


def test_a_model_whose_layers_do_not_give_its_hidden_states_is_asked_for_them(monkeypatch):
    """Hooks that give something else are found at start, and not used."""
    hooks = FeatureTap._hooks

    def wrong(self, layers, outputs):
        handles = hooks(self, layers, outputs)
        return [
            *handles,
            layers[1].register_forward_hook(lambda *_: outputs.update({1: torch.ones(1)})),
        ]

    monkeypatch.setattr(FeatureTap, "_hooks", wrong)
    target = Target(tiny_target(), 1, 16, LAYER_IDS)
    assert target._features.layers is None
    tokens = torch.arange(4, 12)[None]
    torch.testing.assert_close(
        features_of(target, tokens), expected_of("llama", tokens), atol=1e-4, rtol=1e-4
    )


def test_no_run_warns_of_what_goes_away_in_later_releases():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        target = tiny_target("qwen3")
        engine = Engine(target, tiny_drafter(target), max_length=32)
        assert len(engine.generate([Request([5, 6, 7], 6, stop_ids=[])])[0].tokens) == 6


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("bloom", {}, "ALiBi"),
        ("mpt", {"attn_config": {"alibi": True}}, "ALiBi"),
        ("minimax", {}, "cache of its own"),
    ],
)
def test_a_target_with_a_cache_or_positions_of_its_own_is_refused(kind, changes, named):
    with pytest.raises(DFlashError, match=rf"'{kind}' does not run over this engine.*{named}"):
        Target(tiny_target(kind, **changes), 1, 16)
