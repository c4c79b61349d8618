"""What a drafter does not go along with, and how many ranks share it."""

from types import SimpleNamespace

import pytest

from dflash_plugin.drafter.config import LatentAttentionConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.vllm.scale_out import choose_draft_ranks, refuse_unsupported
from tests.helpers.tiny import latent, tiny_config
from tests.vllm.test_adapter import engine_args

LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 24,
}


@pytest.mark.parametrize(
    ("setting", "value", "fix"),
    [
        ("pipeline_parallel_size", 2, "leave it at 1 and give --tensor-parallel-size"),
        ("prefill_context_parallel_size", 4, "leave it at 1"),
        ("decode_context_parallel_size", 2, "leave it at 1"),
        ("enable_dbo", True, "leave --enable-dbo out"),
        ("ubatch_size", 2, "leave --ubatch-size out"),
    ],
)
def test_a_setting_that_a_drafter_does_not_go_along_with_is_named(setting, value, fix):
    with pytest.raises(DFlashError, match=rf"^{setting} is {value}, and .*: {fix}$"):
        refuse_unsupported(engine_args(**{setting: value}))


def test_other_settings_are_vllms():
    given = SimpleNamespace(**vars(engine_args(ubatch_size=1)), data_parallel_size=2)
    refuse_unsupported(given)
    assert given.data_parallel_size == 2


HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("changes", "shards", "ranks"),
    [
        ({}, 1, None),
        ({}, 2, None),
        # Fewer key/value heads than ranks are repeated.
        ({}, 8, None),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, 1),
        ({"num_key_value_heads": 2}, 4, None),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 4, 1),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, 1),
        ({"intermediate_size": 50}, 4, 1),
    ],
)
def test_a_drafter_whose_sizes_do_not_divide_is_whole_on_each_rank(changes, shards, ranks):
    settings = {}
    choose_draft_ranks(tiny_config(**{**HEADS, **changes}), shards, settings)
    assert settings.get("draft_tensor_parallel_size") == ranks


def test_latent_attention_divides_by_its_heads():
    settings = {}
    config = tiny_config(**latent(LatentAttentionConfig(**LATENT)), intermediate_size=48)
    choose_draft_ranks(config, 4, settings)
    assert settings == {}
    choose_draft_ranks(config, 8, settings)
    assert settings == {"draft_tensor_parallel_size": 1}


@pytest.mark.parametrize("asked", [1, 4])
def test_what_is_asked_for_stays_or_is_refused(asked):
    settings = {"draft_tensor_parallel_size": asked}
    choose_draft_ranks(tiny_config(**HEADS), 4, settings)
    assert settings == {"draft_tensor_parallel_size": asked}
    odd = tiny_config(**{**HEADS, "num_attention_heads": 12, "num_key_value_heads": 6})
    if asked == 1:
        choose_draft_ranks(odd, 4, settings)
        assert settings == {"draft_tensor_parallel_size": 1}
        return
    with pytest.raises(
        DFlashError, match=r"size is 4, which does not divide .* 6 key/value heads: leave it out"
    ):
        choose_draft_ranks(odd, 4, settings)
