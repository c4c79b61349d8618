"""Layers with latent attention against Transformers' DeepSeek V3, which has the same tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from dflash_plugin.drafter.blockwise import block_hidden, make_blocks
from dflash_plugin.drafter.config import DrafterConfig, LatentAttentionConfig, RopeConfig
from dflash_plugin.drafter.fp8_linear import Fp8Linear, quantize_drafter
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.static_store import StaticStore
from tests.helpers.tiny import DFLASH2, latent, tiny_drafter, tiny_target, tiny_tensors

CONTEXT = 11
YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
ROTATIONS = {
    "plain": RopeConfig(interleaved=True),
    "halves": RopeConfig(),
    "yarn": RopeConfig(type="yarn", parameters=YARN, interleaved=True),
}
SIZES = {
    "narrow values": LatentAttentionConfig(
        q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7
    ),
    "wide values, direct queries": LatentAttentionConfig(
        kv_lora_rank=10, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=11
    ),
    "rotated alone": LatentAttentionConfig(
        q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=0, qk_rope_head_dim=8, v_head_dim=8
    ),
}


class Reference:
    """The drafter's layers on Transformers' attention, over context and block at once."""

    def __init__(self, config: DrafterConfig, tensors: dict[str, Tensor]) -> None:
        assert config.latent_attention is not None
        self.config, self.tensors = config, tensors
        rope = config.rope
        theirs = DeepseekV3Config(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            attention_bias=config.attention_bias,
            rope_interleave=rope.interleaved,
            max_position_embeddings=rope.max_position_embeddings,
            rope_parameters={
                "rope_type": rope.type, "rope_theta": rope.theta, **rope.parameters
            },
            **config.latent_attention.model_dump(),
        )  # fmt: skip
        theirs._attn_implementation = "eager"
        self.rotary = DeepseekV3RotaryEmbedding(theirs)
        self.attentions = []
        for index in range(len(config.layers)):
            attention = DeepseekV3Attention(theirs, index)
            prefix = f"layers.{index}.self_attn."
            attention.load_state_dict(
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
            )
            self.attentions.append(attention.eval())

    def norm(self, x: Tensor, name: str) -> Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return scaled * self.tensors[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def visible(self, layer: int, anchor: int) -> Tensor:
        """What each row of the block at ``anchor`` sees of context and block, bool [T, keys]."""
        rules = self.config.layers[layer]
        queries = range(anchor, anchor + self.config.block_size)
        window = rules.sliding_window or 10**6
        return torch.tensor(
            [
                [
                    abs(query - key) < window and not (rules.causal and key > query)
                    for key in range(anchor + self.config.block_size)
                ]
                for query in queries
            ]
        )

    def __call__(self, features: Tensor, embedded: Tensor) -> Tensor:
        """Hidden states [T, hidden] of a block behind features [S, n * hidden]."""
        anchor, size = features.shape[0], self.config.block_size
        context = self.norm(self.linear(features, "fc"), "hidden_norm")
        tables = self.rotary(context, torch.arange(anchor + size)[None])
        hidden = embedded
        for index, attention in enumerate(self.attentions):
            rows = self.norm(hidden, f"layers.{index}.input_layernorm")
            mask = torch.zeros(anchor + size, anchor + size)
            mask[anchor:].masked_fill_(~self.visible(index, anchor), -1e9)
            both = torch.cat([context, rows])[None]
            hidden = hidden + attention(both, tables, mask[None, None])[0][0, anchor:]
            rows = self.norm(hidden, f"layers.{index}.post_attention_layernorm")
            mlp = f"layers.{index}.mlp"
            inner = F.silu(self.linear(rows, f"{mlp}.gate_proj"))
            inner = inner * self.linear(rows, f"{mlp}.up_proj")
            hidden = hidden + self.linear(inner, f"{mlp}.down_proj")
        return self.norm(hidden, "norm")


def some_features(drafter: Drafter, rows: int = CONTEXT, seed: int = 2) -> Tensor:
    """Random context features [1, rows, n * hidden]."""
    width = len(drafter.config.target_layer_ids) * drafter.config.target_hidden_size
    return torch.randn(1, rows, width, generator=torch.Generator().manual_seed(seed))


def with_store(drafter: Drafter) -> Drafter:
    """The drafter with an empty store for one request."""
    drafter.store = StaticStore(drafter, 1, 32, torch.float32, torch.device("cpu"))
    return drafter


@torch.no_grad()
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "attention_output_bias": True},
        {"layers": ({"sliding_window": 5}, {"causal": True})},
    ],
    ids=["plain", "biases", "windows"],
)
def test_a_block_is_what_deepseeks_attention_makes_of_it(rotation, sizes, changes):
    changes = {**latent(SIZES[sizes]), "rope": ROTATIONS[rotation], **changes}
    drafter = with_store(tiny_drafter(tiny_target(), **changes))
    config = drafter.config
    reference = Reference(config, tiny_tensors(config))
    features = some_features(drafter)
    drafter.inject(features, torch.arange(CONTEXT)[None])
    found = drafter.draft(torch.tensor([7]), torch.tensor([CONTEXT]))[0]
    block = torch.tensor([7] + [config.mask_token_id] * (config.block_size - 1))
    expected = reference(features[0], drafter.embed(block))
    torch.testing.assert_close(found, expected[1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_injection_in_parts_stores_what_the_whole_does(data):
    """Parts of any size, with rejected rows behind them, in the order in which they are decoded."""
    sizes = SIZES[data.draw(st.sampled_from(sorted(SIZES)))]
    drafter = with_store(tiny_drafter(tiny_target(), **latent(sizes)))
    features = some_features(drafter)
    drafter.inject(features, torch.arange(CONTEXT)[None])
    anchor = torch.tensor([7]), torch.tensor([CONTEXT])
    expected = drafter.draft(*anchor)
    with_store(drafter)
    start = 0
    while start < CONTEXT:
        end = data.draw(st.integers(start + 1, CONTEXT))
        rejected = data.draw(st.integers(0, 3))
        rows = torch.cat([features[:, start:end], some_features(drafter, rejected, seed=5)], dim=1)
        positions = torch.cat([torch.arange(start, end), torch.full((rejected,), -1)])
        drafter.inject(rows, positions[None])
        # Blocks on the way leave nothing behind.
        drafter.draft(torch.tensor([9]), torch.tensor([end]))
        start = end
    torch.testing.assert_close(drafter.draft(*anchor), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("extra", [{}, DFLASH2], ids=["dflash", "dflash2"])
def test_packed_blocks_are_what_blocks_alone_are(extra):
    changes = {**latent(SIZES["narrow values"]), **extra}
    drafter = with_store(tiny_drafter(tiny_target(), **changes))
    features = some_features(drafter)
    tokens = torch.arange(5, 5 + CONTEXT)[None]
    anchors = torch.tensor([[2, 6]])
    blocks = make_blocks(
        tokens, torch.tensor([CONTEXT]), anchors, torch.ones(1, 2, dtype=torch.bool), drafter.config
    )
    packed = block_hidden(drafter, features, blocks)[0]
    for index, anchor in enumerate(anchors[0].tolist()):
        with_store(drafter).inject(features[:, :anchor], torch.arange(anchor)[None])
        alone = drafter.draft(tokens[:, anchor], torch.tensor([anchor]))[0]
        torch.testing.assert_close(packed[index], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fp8_rounds_all_of_its_linears():
    drafter = with_store(tiny_drafter(tiny_target(), **latent(SIZES["narrow values"])))
    features = some_features(drafter)
    anchor = torch.tensor([7]), torch.tensor([CONTEXT])
    drafter.inject(features, torch.arange(CONTEXT)[None])
    exact = drafter.draft(*anchor)
    quantize_drafter(drafter)
    attention = drafter.attentions()[0]
    rounded = [name for name, part in attention.named_children() if isinstance(part, Fp8Linear)]
    linears = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "output_proj"]
    assert rounded == linears
    drafter.inject(features, torch.arange(CONTEXT)[None])
    rounded_drafts = drafter.draft(*anchor)
    assert torch.cosine_similarity(rounded_drafts, exact, dim=-1).min() > 0.9
    assert not torch.equal(rounded_drafts, exact)
