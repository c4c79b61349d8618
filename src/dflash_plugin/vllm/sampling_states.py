"""Hands the V2 runner's sampling states to our speculator."""

from __future__ import annotations

from functools import wraps
from typing import Any

from dflash_plugin.vllm.protocols import Method


def give_limits(native: Method) -> Method:
    """``GPUModelRunner.load_model`` that tells our speculator where its requests' limits are."""

    @wraps(native)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        from dflash_plugin.vllm.speculator import Speculator

        native(self, *args, **kwargs)
        speculator = self.speculator
        if isinstance(speculator, Speculator) and speculator.limits is not None:
            speculator.limits.states = self.sampler.sampling_states

    return load_model
