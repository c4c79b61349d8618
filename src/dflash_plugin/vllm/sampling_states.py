"""Hands the V2 runner's sampling states to our speculator."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from dflash_plugin.vllm.protocols import Method


def give_limits(native: Method) -> Method:
    """``GPUModelRunner.load_model`` that tells our speculator where its requests' limits are."""

    @wraps(native)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        native(self, *args, **kwargs)
        # Imported by now if the runner's speculator is ours. To import it before vLLM's own would
        # run in a circle: vLLM's module, once imported, is patched with ours.
        module: Any = sys.modules.get("dflash_plugin.vllm.speculator")
        speculator = self.speculator
        if module is None or not isinstance(speculator, module.Speculator):
            return
        if speculator.limits is not None:
            speculator.limits.states = self.sampler.sampling_states

    return load_model
