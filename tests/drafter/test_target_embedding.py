"""What a drafter embeds under targets whose embedding modules scale their rows, or norm them."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from dflash_plugin.checkpoints.io import load_checkpoint
from dflash_plugin.drafter.target_embedding import embedding_factor, stored_rows
from dflash_plugin.transformers import load_drafter
from tests.helpers.tiny import tiny_drafter, tiny_target, write_tiny

TARGETS = {
    "llama": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma4_text": {
        "layer_types": ["full_attention"] * 4,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
    },
    "vaultgemma": {},
}
TOKENS = torch.tensor([[5, 3, 96], [0, 1, 2]])


@pytest.mark.parametrize("kind", TARGETS)
@torch.inference_mode()
def test_a_drafter_embeds_as_the_targets_module_does(kind):
    target = tiny_target(kind, **TARGETS[kind])
    found = tiny_drafter(target).embed(TOKENS)
    torch.testing.assert_close(found, target.get_input_embeddings()(TOKENS), rtol=0, atol=0)
    stored = F.embedding(TOKENS, target.get_input_embeddings().weight)
    assert torch.equal(stored_rows(target.get_input_embeddings())(TOKENS), stored)
    assert torch.equal(found, stored) is ("gemma" not in kind)


@torch.inference_mode()
def test_the_factor_is_rounded_as_the_targets_is():
    target = tiny_target("gemma3_text", hidden_size=48).bfloat16()
    drafter = tiny_drafter(hidden_size=48, target_hidden_size=48).bfloat16()
    drafter.borrow(target.get_input_embeddings().weight, target.lm_head, factor=48**0.5)
    assert torch.equal(drafter.embed(TOKENS), target.get_input_embeddings()(TOKENS))


@pytest.mark.parametrize(
    "changes", [{"embedding_scale": 1.0}, {"embedding_scale": 2.5}, {"own_embedding": True}]
)
@torch.inference_mode()
def test_a_scale_in_the_checkpoint_or_its_own_rows_take_the_factors_place(changes):
    target = tiny_target("gemma3_text")
    drafter = tiny_drafter(target, **changes)
    rows = (
        drafter.own_embedding
        if drafter.own_embedding is not None
        else (target.get_input_embeddings().weight)
    )
    scale = changes.get("embedding_scale", 1.0)
    assert torch.equal(drafter.embed(TOKENS), F.embedding(TOKENS, rows) * scale)


@torch.inference_mode()
def test_a_mask_vector_stands_for_a_row():
    target = tiny_target("gemma3_text")
    drafter = tiny_drafter(target, own_mask_embedding=True)
    found = drafter.embed(torch.tensor([3, 5]))
    torch.testing.assert_close(found[0], drafter.mask_embedding * 32**0.5)
    torch.testing.assert_close(found[1], target.get_input_embeddings()(torch.tensor(5)))


@torch.inference_mode()
def test_a_speculators_drafter_reads_stored_rows(tmp_path):
    target = tiny_target("gemma3_text")
    drafter = load_drafter(write_tiny(tmp_path, "speculators"), target)
    assert torch.equal(
        drafter.embed(TOKENS), F.embedding(TOKENS, target.get_input_embeddings().weight)
    )


def test_a_missing_scale_and_a_scale_of_one_are_not_the_same(tmp_path):
    for scale in (None, 1.0):
        directory = write_tiny(tmp_path / str(scale), embedding_scale=scale)
        assert load_checkpoint(directory).config.embedding_scale == scale


def test_a_family_that_scales_by_its_configuration():
    minicpm = AutoConfig.for_model("minicpm3", scale_emb=12)
    assert embedding_factor(minicpm) == 12.0
    assert embedding_factor(AutoConfig.for_model("granite", embedding_multiplier=12.0)) == 1.0
