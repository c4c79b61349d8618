"""A drafter on an engine's layers, with layers and ranks made here."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dflash_plugin.drafter.config import LatentAttentionConfig
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.kernels.fp8_rows import Fp8Rows, quantize
from dflash_plugin.serving import engine_drafter as mixin
from dflash_plugin.serving import fp8_weights
from dflash_plugin.serving.draft_tokens import shard_rows
from dflash_plugin.serving.drafter_spec import DrafterSpec, Options
from dflash_plugin.serving.engine_drafter import EngineDrafterMixin
from dflash_plugin.serving.layers import EngineClasses, EngineLayers, QKVShard
from dflash_plugin.serving.weights import fill
from tests.helpers.tiny import DFLASH2, latent, tiny_drafter, tiny_target, write_tiny

made: list[dict[str, Any]] = []


class Plain:
    """The engine's method of layers that are not quantized."""


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, *, bias: bool, prefix: str, **common: Any):
        super().__init__(inputs, outputs, bias=bias)
        self.quant_method: Any = Plain()
        self.input_size, self.output_size_per_partition = inputs, outputs
        made.append({"class": type(self), "bias": bias, "prefix": prefix, **common})


class QKV(QKVShard, Linear):
    plain_method = Plain

    def __init__(self, hidden: int, head_dim: int, heads: int, kv_heads: int, **given: Any):
        super().__init__(hidden, (heads + 2 * kv_heads) * head_dim, **given)
        self.num_heads, self.head_size = heads, head_dim


class Merged(Linear):
    def __init__(self, inputs: int, outputs: list[int], **given: Any):
        super().__init__(inputs, sum(outputs), **given)


class Head(Linear):
    def __init__(self, rows: int, hidden: int, *, prefix: str):
        super().__init__(hidden, rows, bias=False, prefix=prefix)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Head:
        head = cls(*weight.shape, prefix="")
        head.weight.data = weight.detach().clone()
        return head


CLASSES = EngineClasses(QKV, Merged, Linear, Linear, Head)


class Layers(EngineLayers):
    def full_name(self, name: str) -> str:
        return f"model.{name}"


class EngineDrafter(EngineDrafterMixin, nn.Module):
    plain_linear = plain_head = Plain

    def __init__(self, spec: DrafterSpec, gather: Any = None) -> None:
        super().__init__()
        self.spec, self.gather, self.vocab_size = spec, gather, 97
        self.drafter = Drafter(spec.config, Layers(CLASSES, 1, quant_config="its"))
        self.drafter.requires_grad_(False)

    def shard_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head: Any = self.drafter.head()
        return hidden @ head.weight[: self.shard_rows()].T


def by_part(parameter: torch.Tensor, tensor: torch.Tensor, shard: Any = None) -> None:
    """Fill a merged weight, part after part."""
    filled = getattr(parameter, "filled", 0) if shard is not None else 0
    parameter.data[filled : filled + len(tensor)] = tensor
    parameter.filled = filled + len(tensor)  # type: ignore[attr-defined]


def engine_drafter(tmp_path, gather=None, options=Options(), **changes) -> EngineDrafter:  # noqa: B008
    made.clear()
    core = tiny_drafter(**changes)
    spec = DrafterSpec(
        checkpoint=write_tiny(tmp_path / "drafter", **changes),
        config=core.config,
        options=options,
    )
    drafter = EngineDrafter(spec, gather)
    for parameter in drafter.parameters():
        parameter.weight_loader = by_part
    fill(drafter.drafter, spec, 0)
    return drafter


def shard(weight: torch.Tensor, start: int, rows: int) -> Any:
    """A rank's head, with padding that would win."""
    padded = torch.cat([weight[start : start + rows], 100 * torch.ones(2, weight.shape[1])])
    indices = SimpleNamespace(org_vocab_start_index=start, num_org_elements=rows)
    return SimpleNamespace(weight=padded, quant_method=Plain(), shard_indices=indices)


def test_every_layer_gets_its_name_and_the_engines_arguments(tmp_path):
    engine_drafter(tmp_path, own_head=True, attention_bias=True, attention_output_bias=True)
    names = {one["prefix"]: one for one in made}
    qkv = names["model.layers.1.self_attn.qkv_proj"]
    assert qkv == {
        "class": QKV,
        "bias": True,
        "prefix": "model.layers.1.self_attn.qkv_proj",
        "quant_config": "its",
    }
    assert names["model.layers.0.mlp.gate_up_proj"]["class"] is Merged
    assert names["model.layers.0.mlp.down_proj"]["quant_config"] == "its"
    heads = [one for one in made if one["class"] is Head]
    assert len(heads) == 1
    assert "quant_config" not in heads[0]


@pytest.mark.parametrize("bias", [False, True])
def test_context_projections_of_all_layers_are_one_product(tmp_path, bias):
    changes = {"attention_bias": bias, "attention_output_bias": bias}
    core, drafter = tiny_drafter(**changes), engine_drafter(tmp_path, **changes)
    drafter.prepare_weights()
    x = torch.randn(5, 32)
    one = torch.nn.functional.linear(x, drafter.context_weight, drafter.context_bias)
    expected = [layer.qkv_proj.keys_values(x) for layer in core.attentions()]
    torch.testing.assert_close(one, torch.cat(expected, dim=-1))
    stacked = drafter.context_weight
    drafter.prepare_weights()
    assert drafter.context_weight is stacked


def test_a_weight_that_is_not_plain_goes_through_its_layer(tmp_path):
    """Quantized, or packed by a platform under the same method."""
    core, drafter = tiny_drafter(), engine_drafter(tmp_path)
    first, second = (layer.qkv_proj for layer in drafter.drafter.attentions())
    first.quant_method = object()
    second.input_size = 16
    assert not first.is_plain
    assert not second.is_plain
    drafter.prepare_weights()
    assert drafter.context_weight is None
    x = torch.randn(5, 32)
    expected = core.attentions()[0].qkv_proj.keys_values(x)
    torch.testing.assert_close(first.keys_values(x), expected)


@pytest.mark.parametrize("draft_weights", ["checkpoint", "fp8"])
def test_latent_attention_has_nothing_to_stack(tmp_path, draft_weights):
    """Loaders announce weights once, and binding does again: they are rounded once."""
    sizes = LatentAttentionConfig(
        q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7
    )
    options = Options(draft_weights=draft_weights)
    drafter = engine_drafter(tmp_path, options=options, **latent(sizes))
    core = tiny_drafter(**latent(sizes))
    for _ in range(2):
        drafter.prepare_weights()
        assert drafter.context_weight is None
    linear: Any = drafter.drafter.attentions()[1].kv_b_proj
    expected = core.attentions()[1].kv_b_proj.weight.detach()
    if draft_weights == "fp8":
        assert torch.equal(linear.weight.float(), quantize(expected).values.float())
    else:
        assert torch.equal(linear.weight, expected)


def test_a_target_that_has_nothing_to_lend_is_refused(tmp_path):
    target, drafter = tiny_target(), engine_drafter(tmp_path)
    for embedding, head in ((None, target.lm_head), (target.model.embed_tokens, None)):
        with pytest.raises(DFlashError, match="LlamaForCausalLM has no embedding or lm_head"):
            drafter.borrow(target, embedding, head)
    drafter.borrow(target, target.model.embed_tokens, target.lm_head)
    assert drafter.drafter.head() is target.lm_head
    assert drafter.shard_rows() == 97


def test_rows_of_a_head_that_are_no_tokens_of_the_target_are_left_out():
    """A drafter's own head may be padded, or have more rows than the target has tokens."""
    for start, rows, expected in ((0, 97, 97), (0, 104, 97), (90, 20, 7), (100, 20, 0)):
        assert shard_rows(shard(torch.zeros(200, 4), start, rows), 97) == expected


@pytest.mark.parametrize("draft_weights", ["auto", "fp8", "checkpoint"])
@pytest.mark.parametrize("obstacle", [None, "there is an obstacle"])
def test_weights_are_rounded_where_they_can_be(
    monkeypatch, caplog, tmp_path, draft_weights, obstacle
):
    monkeypatch.setattr(mixin, "fp8_obstacle", lambda *_: obstacle)
    target, options = tiny_target(), Options(draft_weights=draft_weights)
    drafter = engine_drafter(tmp_path, options=options)
    with caplog.at_level("INFO"):
        drafter.borrow(target, target.model.embed_tokens, Head.of(target.lm_head.weight))
        drafter.prepare_weights()
    rounds = draft_weights == "fp8" or (draft_weights == "auto" and obstacle is None)
    assert isinstance(drafter.context_weight, Fp8Rows) is rounds
    assert hasattr(drafter.drafter.head(), "fp8_scales") is rounds
    assert (obstacle is not None and obstacle in caplog.text) is (
        draft_weights == "auto" and obstacle is not None
    )


@pytest.mark.parametrize("rounds", [False, True])
def test_new_weights_of_the_targets_head_are_rounded_again(tmp_path, rounds):
    target = tiny_target()
    options = Options(draft_weights="fp8" if rounds else "checkpoint")
    drafter = engine_drafter(tmp_path, options=options)
    head = Head.of(target.lm_head.weight)
    drafter.borrow(target, target.model.embed_tokens, head)
    drafted: Any = drafter.drafter.head()
    address = drafted.weight.data_ptr()
    with torch.no_grad():
        head.weight.mul_(-3)
    drafter.follow_target()
    assert not rounds or not torch.equal(drafted.fp8_scales, quantize(head.weight.detach()).scales)
    drafter.target_changed = True
    drafter.follow_target()
    # A captured graph reads the same memory.
    assert drafted.weight.data_ptr() == address
    if rounds:
        expected = quantize(head.weight.detach())
        assert torch.equal(drafted.weight.float(), expected.values.float())
        assert torch.equal(drafted.fp8_scales, expected.scales)
    else:
        assert drafted is head


@pytest.mark.parametrize(
    ("dtype", "method", "device", "refused", "message"),
    [
        (torch.bfloat16, Plain, "cuda", False, None),
        (torch.bfloat16, Plain, "cpu", False, "does not run on a GPU"),
        (torch.bfloat16, Plain, "cuda", True, "FP8 draft weights need a GPU"),
        (torch.float32, Plain, "cuda", False, "fc is torch.float32"),
        (torch.bfloat16, object, "cuda", False, "the checkpoint quantizes .*qkv_proj"),
    ],
)
def test_what_keeps_weights_from_being_rounded(
    monkeypatch, tmp_path, dtype, method, device, refused, message
):
    def require(_: torch.device) -> None:
        if refused:
            raise DFlashError("FP8 draft weights need a GPU: leave them")

    monkeypatch.setattr(fp8_weights, "require_fp8", require)
    drafter = engine_drafter(tmp_path, intermediate_size=48).drafter.to(dtype)
    drafter.attentions()[0].qkv_proj.quant_method = method()
    found = fp8_weights.fp8_obstacle(drafter, Plain, torch.device(device))
    assert found is None if message is None else re.search(message, found)


def test_weights_whose_sides_do_not_fit_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(fp8_weights, "require_fp8", lambda device: None)
    drafter = engine_drafter(tmp_path, intermediate_size=40).drafter.to(torch.bfloat16)
    found = fp8_weights.fp8_obstacle(drafter, Plain, torch.device("cuda"))
    assert found is not None
    assert "no multiples of 16" in found


@pytest.mark.parametrize("first_rank", [97, 30])
@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": 48, "own_head": True}])
def test_the_likeliest_token_of_all_ranks(tmp_path, first_rank, changes):
    """One of two ranks may have no token of a small head."""
    target, drafter = tiny_target(), engine_drafter(tmp_path, **changes)
    drafter.borrow(target, target.model.embed_tokens, target.lm_head)
    weight = drafter.drafter.head().weight
    hidden = torch.randn(6, 32)
    expected = drafter.drafter.token_ids((hidden @ weight.T).argmax(dim=-1))
    rows = min(first_rank, len(weight))
    sent: list[list[torch.Tensor]] = []

    def record(part: torch.Tensor) -> torch.Tensor:
        sent[-1].append(part)
        return torch.zeros_like(part)

    for start, count in ((0, rows), (rows, len(weight) - rows)):
        head = shard(weight, start, count)
        drafter.drafter.head = lambda head=head: head
        drafter.gather = record
        sent.append([])
        drafter.top_tokens(hidden)
    gathered = iter([torch.cat(parts, dim=-1) for parts in zip(*sent, strict=True)])
    drafter.gather = lambda _: next(gathered)
    assert torch.equal(drafter.top_tokens(hidden), expected)


def test_the_likeliest_token_of_one_rank(tmp_path):
    target, drafter = tiny_target(), engine_drafter(tmp_path)
    drafter.borrow(target, target.model.embed_tokens, target.lm_head)
    hidden = torch.randn(6, 32)
    expected = (hidden @ target.lm_head.weight.T).argmax(dim=-1)
    head = shard(target.lm_head.weight, 0, 97)
    drafter.drafter.head = lambda: head
    assert torch.equal(drafter.top_tokens(hidden), expected)


def test_candidates_are_the_cores(tmp_path):
    target = tiny_target()
    core, drafter = tiny_drafter(target, **DFLASH2), engine_drafter(tmp_path, **DFLASH2)
    drafter.borrow(target, target.model.embed_tokens, target.lm_head)
    hidden = torch.randn(6, 32)
    found = drafter.candidates(hidden)
    logits = core.scale_logits(hidden @ target.lm_head.weight.T)
    best = logits.topk(found.tokens.shape[1], dim=-1)
    assert torch.equal(found.tokens, best.indices)
    torch.testing.assert_close(found.logits, best.values)
    torch.testing.assert_close(found.gates, core.candidate_selector.hidden_projection(hidden))
