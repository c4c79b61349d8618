"""Options of the plugin in vLLM, and what travels with the draft model's configuration."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import KEY
from dflash_plugin.serving import drafter_spec as shared
from dflash_plugin.serving.drafter_spec import Options, validated
from dflash_plugin.serving.variables import given_options, nearest, require_switch, variable
from dflash_plugin.vllm import compat
from dflash_plugin.vllm.protocols import SpeculativeConfig, VllmConfig

logger = logging.getLogger("vllm.dflash_plugin")
# Attribute of ours on a model runner.
DRAFTS = "dflash_drafts"


class DrafterSpec(shared.DrafterSpec):
    """What the workers know of a drafter, with what the user left open in vLLM.

    Attributes:
        captures_prompts: whole passes that read prompts may be captured, as the user did not say
            which passes are.
    """

    captures_prompts: bool = False


def read_options(additional_config: Any) -> Options:
    """Validated ``additional_config["dflash_plugin"]``.

    Raises:
        DFlashError: names the option that is wrong.
    """
    require_switch()
    additional = additional_config if isinstance(additional_config, dict) else {}
    for key in additional:
        # Other plugins have keys of their own.
        if key != KEY and nearest(str(key), [KEY]):
            raise DFlashError(f"additional_config has {key!r}: write {KEY!r}")
    for option, value in given_options().items():
        logger.warning(
            "%s is %r, and dflash-plugin reads it in SGLang alone: give vLLM "
            '--additional-config \'{"%s": {"%s": …}}\'',
            *(variable(option), value, KEY, nearest(option, Options.model_fields) or option),
        )
    return validated(Options, additional.get(KEY, {}), "additional_config")


def refuse_misplaced(settings: Mapping[str, Any]) -> None:
    """Refuse keys of the speculative configuration that vLLM does not know.

    Args:
        settings: the speculative configuration, of a request for DFlash.

    Raises:
        DFlashError: names the key, and where it belongs or what it is most like.
    """
    known = speculative_keys()
    for key, value in settings.items():
        if key in known:
            continue
        if key in Options.model_fields or key == KEY:
            inside = value if key == KEY else {key: value}
            where = json.dumps({KEY: inside}, default=str)
            raise DFlashError(
                f"the speculative configuration has {key!r}, an option of dflash-plugin: give it "
                f"in --additional-config '{where}'"
            )
        similar = nearest(key, known)
        raise DFlashError(
            f"the speculative configuration has {key!r}, which vLLM {compat.installed()} does not "
            "know: " + (f"did you mean {similar!r}?" if similar else "leave it out")
        )


def speculative_keys() -> set[str]:
    """Keys that vLLM's speculative configuration has."""
    from vllm.config.speculative import SpeculativeConfig

    return {field.name for field in dataclasses.fields(SpeculativeConfig)}


def drafter_spec(speculative_config: SpeculativeConfig | None) -> DrafterSpec | None:
    """The spec in a ``SpeculativeConfig``, or None where the plugin did not stage the drafter."""
    draft = None if speculative_config is None else speculative_config.draft_model_config
    values = None if draft is None else vars(draft.hf_config).get(KEY)
    return None if values is None else DrafterSpec.model_validate(values)


def drafts_for(runner: Any) -> bool:
    """Whether the plugin drafts for a model runner.

    It is looked up once and kept on the runner: reading the spec takes longer than a step may.
    """
    known = vars(runner)
    if DRAFTS not in known:
        known[DRAFTS] = drafter_spec(runner.vllm_config.speculative_config) is not None
    return bool(known[DRAFTS])


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
