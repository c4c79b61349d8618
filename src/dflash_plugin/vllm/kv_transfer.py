"""Caches that go from a server that fills them to one that decodes: whose fit each other."""

from __future__ import annotations

from functools import wraps
from typing import Any

from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import Method, VllmConfig


def compare_drafters(native: Method) -> Method:
    """``_get_speculative_compatibility_factors`` that compares drafters instead of their paths.

    Servers agree over NIXL only where vLLM's factors do, one of which is the draft model's path.
    Here that is a staged directory, which also depends on where the checkpoint lies and on the
    greatest length of a request, and those may differ. What shapes a drafter's cache is in its
    configuration.
    """

    @wraps(native)
    def factors(vllm_config: VllmConfig) -> Any:
        found = native(vllm_config)
        spec = drafter_spec(vllm_config.speculative_config)
        if found is None or spec is None:
            return found
        return {**found, "model": spec.config.model_dump_json()}

    return factors
