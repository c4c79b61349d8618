"""New weights for a running engine.

Those of the target are followed by the copy of its head that drafts. Those of the drafter are
refused before vLLM takes it apart: vLLM loads them layer by layer, into the names of its own draft
model; this drafter's names differ by dialect, and parts of its weights are stacked or rounded when
they are loaded.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from dflash_plugin.errors import DFlashError
from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import Method

REFUSED = (
    "the drafter of a running engine takes no new weights: start the engine with the new drafter, "
    "or with DFLASH_PLUGIN=off, which serves drafters that vLLM reads by vLLM's own DFlash"
)


def take_no_draft_weights(native: Method) -> Method:
    """``Worker.supports_draft_weight_updates`` that says no for this project's drafters."""

    @wraps(native)
    def supports_draft_weight_updates(self: Any) -> bool:
        return drafter_spec(self.speculative_config) is None and bool(native(self))

    return supports_draft_weight_updates


def refuse_draft_weights(native: Method) -> Method:
    """``Worker._set_draft_weight_update_target`` that refuses this project's drafters.

    Raises:
        DFlashError: the drafter is one.
    """

    @wraps(native)
    def set_target(self: Any) -> None:
        if drafter_spec(self.speculative_config) is not None:
            raise DFlashError(REFUSED)
        native(self)

    return set_target


def refresh_head(native: Method) -> Method:
    """``Worker.finish_weight_update`` or ``reload_weights``, then the FP8 head from the new one."""

    @wraps(native)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = native(self, *args, **kwargs)
        if drafter_spec(self.speculative_config) is not None:
            self.get_draft_model().refresh_head()
        return result

    return run
