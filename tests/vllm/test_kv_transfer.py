"""Whose caches fit each other."""

from types import SimpleNamespace

from dflash_plugin.serving.drafter_spec import DrafterSpec, Options
from dflash_plugin.vllm.kv_transfer import compare_drafters
from tests.helpers.tiny import tiny_config


def factors(place, staged, **changes):
    """What vLLM compares of a server, whose drafter lies at ``place``."""
    spec = DrafterSpec(checkpoint=place, config=tiny_config(**changes), options=Options())
    hf_config = SimpleNamespace(dflash_plugin=spec.model_dump(mode="json"))
    draft = SimpleNamespace(model=staged, hf_config=hf_config)
    config = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=draft))

    def native(vllm_config):
        model = vllm_config.speculative_config.draft_model_config.model
        return {"method": "dflash", "model": model}

    return compare_drafters(native)(config)


def test_drafters_are_compared_by_what_they_are_instead_of_where_they_lie(tmp_path):
    one = factors(tmp_path / "one", "/cache/1")
    assert one["method"] == "dflash"
    assert factors(tmp_path / "other", "/cache/2") == one
    assert factors(tmp_path / "one", "/cache/1", target_layer_ids=(0, 1)) != one


def test_other_draft_models_stay_as_vllm_compares_them():
    config = SimpleNamespace(speculative_config=None)
    assert compare_drafters(lambda vllm_config: None)(config) is None
    draft = SimpleNamespace(hf_config=SimpleNamespace())
    config = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=draft))
    assert compare_drafters(lambda vllm_config: {"model": "x"})(config) == {"model": "x"}
