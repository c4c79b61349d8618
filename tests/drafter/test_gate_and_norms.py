"""Gate, norms of taps and normed context against arithmetic written out here."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.drafter.blockwise import block_hidden, make_blocks
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.static_store import StaticStore
from dflash_plugin.drafter.target_features import features_of
from dflash_plugin.transformers import Engine, Request
from tests.helpers.layouts import LAGUNA
from tests.helpers.tiny import tiny_config, tiny_drafter, tiny_target, tiny_tensors

LENGTH, SIZE, DIM = 9, 4, 8
KINDS: dict[str, dict[str, Any]] = {
    "gate of a head": {"attention_gate": "per-head"},
    "gate of a channel": {"attention_gate": "per-element"},
    "norm of a tap": {"norm_per_tap": True},
    "normed context": {"norm_context": True},
    "gemma": {**LAGUNA, "norm_style": "gemma"},
    "all": LAGUNA,
}


def norm(x: Tensor, weight: Tensor, gemma: bool) -> Tensor:
    scaled = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * (weight + 1 if gemma else weight)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [T, heads, 8], halves rotated against each other."""
    frequencies = 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = (positions[:, None].double() * frequencies)[:, None]
    one, other = x.double().chunk(2, dim=-1)
    return torch.cat(
        [one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1
    ).to(x.dtype)


def part_of(tensors: dict[str, Tensor], layer: int, name: str) -> Tensor:
    return tensors[f"layers.{layer}.{name}.weight"]


def expected_block(changes: dict[str, Any], features: Tensor, embedded: Tensor) -> Tensor:
    """Normed hidden states [4, 32] of one block behind features [9, 64]; every row sees all."""
    tensors = {name: t.double() for name, t in tiny_tensors(tiny_config(**changes)).items()}
    gemma = changes.get("norm_style") == "gemma"
    parts = features.double().chunk(2, dim=-1)
    if changes.get("norm_per_tap"):
        parts = [
            norm(p, tensors[f"aux_hidden_norms.{i}.weight"], gemma) for i, p in enumerate(parts)
        ]
    context = torch.cat(list(parts), -1) @ tensors["fc.weight"].T
    context = norm(context, tensors["hidden_norm.weight"], gemma)
    positions = torch.arange(LENGTH + SIZE)
    hidden = embedded.double()
    for index in range(2):
        part = partial(part_of, tensors, index)
        rows = norm(hidden, part("input_layernorm"), gemma)
        seen = (
            norm(context, part("input_layernorm"), gemma)
            if changes.get("norm_context")
            else context
        )
        both = torch.cat([seen, rows])
        query = (rows @ part("self_attn.q_proj").T).unflatten(-1, (4, DIM))
        key, value = (
            (both @ part(f"self_attn.{name}_proj").T).unflatten(-1, (2, DIM)) for name in "kv"
        )
        query = rotate(norm(query, part("self_attn.q_norm"), gemma), positions[LENGTH:])
        key = rotate(norm(key, part("self_attn.k_norm"), gemma), positions)
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        weights = torch.einsum("qhd,khd->hqk", query, key).div(DIM**0.5).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, value)
        if changes.get("attention_gate"):
            gate = (rows @ part("self_attn.g_proj").T).exp().add(1).log()
            attended = attended * gate.unflatten(-1, (4, -1))
        hidden = hidden + attended.flatten(-2) @ part("self_attn.o_proj").T
        rows = norm(hidden, part("post_attention_layernorm"), gemma)
        gate = rows @ part("mlp.gate_proj").T
        inner = gate * gate.sigmoid() * (rows @ part("mlp.up_proj").T)
        hidden = hidden + inner @ part("mlp.down_proj").T
    return norm(hidden, tensors["norm.weight"], gemma)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_block_is_the_arithmetics(kind):
    changes = KINDS[kind]
    drafter = tiny_drafter(tiny_target(), **changes)
    features = torch.randn(LENGTH, 64, generator=torch.Generator().manual_seed(2))
    anchor, position = torch.tensor([7]), torch.tensor([LENGTH])
    drafter.store = StaticStore(drafter, 1, LENGTH + SIZE, torch.float32, torch.device("cpu"))
    drafter.inject(features[None], torch.arange(LENGTH)[None])
    found = drafter.draft(anchor, position)[0]
    embedded = drafter.embed(torch.tensor([7, 3, 3, 3]))
    wanted = expected_block(changes, features, embedded)[1:]
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    # The part that is tested decides something.
    plain = {"norm_style": changes.get("norm_style", "rms")}
    assert (expected_block(plain, features, embedded)[1:] - wanted).abs().max() > 0.05


@torch.no_grad()
def packed(drafter: Drafter, features: Tensor, tokens: Tensor) -> Tensor:
    anchors = torch.tensor([[LENGTH]])
    blocks = make_blocks(
        tokens, torch.tensor([tokens.shape[1]]), anchors, torch.ones_like(anchors).bool(),
        drafter.config,
    )  # fmt: skip
    return block_hidden(drafter, features, blocks)[0, 0]


def test_packed_blocks_norm_and_gate_alike():
    drafter = tiny_drafter(tiny_target(), **LAGUNA)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, LENGTH, 64, generator=generator)
    tokens = torch.randint(4, 90, (1, LENGTH + SIZE), generator=generator)
    found = packed(drafter, features, tokens)
    block = torch.full((4,), 3)
    block[0] = tokens[0, LENGTH]
    wanted = expected_block(LAGUNA, features[0], drafter.embed(block))[1:]
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normed", [True, False])
@torch.no_grad()
def test_the_last_layer_is_read_behind_the_norm_or_before(normed):
    target = tiny_target()
    config = tiny_config(target_layer_ids=(1, 3), last_layer_normed=normed)
    tokens = torch.arange(5, 14)[None]
    found, logits = features_of(target, config, tokens)
    inner, last = found.chunk(2, dim=-1)
    behind = last if normed else target.model.norm(last)
    torch.testing.assert_close(target.lm_head(behind[:, -1]), logits)
    assert torch.equal(inner, target.model(tokens, output_hidden_states=True).hidden_states[2])


@pytest.mark.parametrize("changes", [LAGUNA, {"last_layer_normed": True}], ids=["before", "behind"])
def test_the_engine_drafts_what_the_core_does(changes):
    """With a tap on the last layer, taken by hooks of the engine's own passes."""
    target = tiny_target()
    drafter = tiny_drafter(target, target_layer_ids=(3, 1), **changes)
    prompt = list(range(5, 16))
    expected = answer(drafter, target, prompt)
    engine = Engine(target, drafter, max_length=64, record_drafts=True)
    (result,) = engine.generate([Request(prompt, 12, stop_ids=[])])
    assert result.drafted[0] == expected.drafts
