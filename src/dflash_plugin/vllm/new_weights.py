"""New weights for a running vLLM: what its worker does with them.

vLLM loads new weights layer by layer, into parameters that it has taken apart for it. The drafter
stays whole: its names differ by dialect, and parts of its weights are stacked or rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.new_weights import refuse_to_lose, restore, take_checkpoint
from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import Method
from dflash_plugin.vllm.workarounds import pack_head

# Sleep level 2 discards all memory of weights.
DISCARDS = 2


class Incoming(nn.Module):
    """The drafter, as far as vLLM's transfers see it: without a parameter to take apart."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.drafter = (model,)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Hand tensors on to the drafter."""
        taken: set[str] = self.drafter[0].load_weights(weights)
        return taken


def receive_draft_weights(native: Method) -> Method:
    """``Worker._set_draft_weight_update_target`` that lets this project's drafters stay whole."""

    @wraps(native)
    def set_target(self: Any) -> None:
        native(self)
        if drafter_spec(self.speculative_config) is not None:
            engine = self.weight_transfer_engine
            engine.set_weight_update_target(Incoming(engine.model), engine.model_config)

    return set_target


def note_target_change(native: Method) -> Method:
    """``Worker.finish_weight_update`` or ``reload_weights``, which the drafter is told of."""

    @wraps(native)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = native(self, *args, **kwargs)
        if drafter_spec(self.speculative_config) is not None:
            self.get_draft_model().target_changed = True
            pack_head(self.get_model())
        return result

    return run


def note_sleep(native: Method) -> Method:
    """``Worker.sleep`` that remembers whether weights are discarded.

    Raises:
        DFlashError: they would be, and the drafter's could not be loaded again.
    """

    @wraps(native)
    def sleep(self: Any, level: int = 1) -> None:
        if level == DISCARDS and drafter_spec(self.speculative_config) is not None:
            refuse_to_lose(self.get_draft_model(), "sleep level 2 discards weights: use level 1")
        native(self, level)
        self.dflash_weights_lost = level == DISCARDS

    return sleep


def restore_when_awake(native: Method) -> Method:
    """``Worker.wake_up``, then the drafter's weights from its checkpoint if they are lost."""

    @wraps(native)
    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        native(self, tags)
        awake = tags is None or "weights" in tags
        if not awake or not self.dflash_weights_lost:
            return
        self.dflash_weights_lost = False
        if drafter_spec(self.speculative_config) is not None:
            restore(self.get_draft_model())

    return wake_up


def reload_draft_weights(worker: Any, path: str) -> None:
    """Replace the drafter's weights by those of a checkpoint: ``collective_rpc`` calls it by name.

    Args:
        worker: vLLM's.
        path: directory of a drafter that differs from the running one in its weights alone.

    Raises:
        DFlashError: there is no drafter of this project, or the checkpoint is not of its kind.
    """
    if drafter_spec(worker.speculative_config) is None:
        raise DFlashError(
            "reload_draft_weights found no drafter of dflash-plugin: start vLLM with one"
        )
    take_checkpoint(worker.get_draft_model(), Path(path))
