"""Options of the plugin in vLLM, and what travels with the draft model's configuration."""

from __future__ import annotations

from typing import Any

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY
from dflash_plugin.serving.drafter_spec import DrafterSpec, Options, validated
from dflash_plugin.vllm.protocols import SpeculativeConfig, VllmConfig


def read_options(additional_config: Any) -> Options:
    """Validated ``additional_config["dflash_plugin"]``.

    Raises:
        DFlashError: names the option that is wrong.
    """
    values = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    return validated(Options, values, "additional_config")


def drafter_spec(speculative_config: SpeculativeConfig | None) -> DrafterSpec | None:
    """The spec in a ``SpeculativeConfig``, or None where the plugin did not stage the drafter."""
    draft = None if speculative_config is None else speculative_config.draft_model_config
    values = None if draft is None else vars(draft.hf_config).get(KEY)
    return None if values is None else DrafterSpec.model_validate(values)


def required_spec(vllm_config: VllmConfig) -> DrafterSpec:
    """The spec in a ``VllmConfig`` that the plugin prepared.

    Raises:
        DFlashError: the plugin did not prepare it.
    """
    spec = drafter_spec(vllm_config.speculative_config)
    if spec is None:
        raise DFlashError(
            "the draft model's configuration has no 'dflash_plugin' entry: start vLLM with "
            "speculative method 'dflash' and let the plugin write it"
        )
    return spec
