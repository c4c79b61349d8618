"""New weights for a running SGLang: what stands in front of its loaders.

SGLang's model runners load new weights through ``runner.weight_updater``. What it raises there ends
the server, and from a file it loads the target's and the drafter's model from the same directory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dflash_plugin.checkpoints.updates import holds_drafter
from dflash_plugin.errors import reason
from dflash_plugin.serving.new_weights import refuse_to_lose, restore, take_checkpoint
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.metrics import Counted

logger = logging.getLogger(__name__)

Answer = tuple[bool, str]
KEPT = "Succeeded to update the target's weights; the drafter keeps its own."
REPLACED = "Succeeded to update the drafter's weights; the target keeps its own."
BUSY = (
    "requests are running, or a step of theirs is: both models keep their weights; let the "
    "requests finish or abort them, then send the weights again"
)
# How SGLang's message begins where it has loaded nothing.
UNTOUCHED = "Failed to get"
# SGLang's tag of the memory of weights; no tags are all of them.
WEIGHTS = "weights"
BACKUPS = ("enable_weights_cpu_backup", "enable_draft_weights_cpu_backup")
FLAGS = tuple("--" + backup.replace("_", "-") for backup in BACKUPS)


def answered(update: Callable[..., Any], *args: Any, **kwargs: Any) -> Answer:
    """An update's answer, or what it raised as one."""
    try:
        done, message = update(*args, **kwargs)
    except Exception as error:  # It would end the server.
        logger.exception("new weights were refused")
        return False, reason(error)
    return bool(done), str(message)


class Updater:
    """In front of a runner's updater, which does what is not written here.

    Args:
        native: SGLang's.
        drafter: the draft model.
    """

    def __init__(self, native: Any, drafter: Any) -> None:
        self._native, self._drafter = native, drafter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


class TargetUpdater(Updater):
    """Of the target's runner; knows a drafter's directory from a target's."""

    def _update(self, name: str, *args: Any, **kwargs: Any) -> Answer:
        self._drafter.target_changed = True
        return answered(getattr(self._native, name), *args, **kwargs)

    def update_weights_from_disk(self, model_path: str, *args: Any, **kwargs: Any) -> Answer:
        """Load a drafter's checkpoint into the drafter, and any other into the target."""
        if holds_drafter(model_path):
            return answered(_replaced, self._drafter, Path(model_path))
        name = "update_weights_from_disk"
        config, before = self._native.model_config, self._native.model_config.model_path
        done, message = self._update(name, model_path, *args, **kwargs)
        if done:
            return True, KEPT
        # SGLang rolls back from the new path, which it has set by then.
        config.model_path = before
        if not message.startswith(UNTOUCHED):
            loaded, _ = self._update(name, before, *args, **kwargs)
            message += f" The target has the weights of {before} again." if loaded else ""
        return False, message

    def update_weights_from_tensor(self, *args: Any, **kwargs: Any) -> Answer:
        """Load tensors; the drafter's are those that begin with ``draft.``."""
        return self._update("update_weights_from_tensor", *args, **kwargs)

    def update_weights_from_distributed(self, *args: Any, **kwargs: Any) -> Answer:
        """The same of tensors that are broadcast, up to SGLang 0.5.20."""
        return self._update("update_weights_from_distributed", *args, **kwargs)

    def load_weights_from_distributed(self, *args: Any, **kwargs: Any) -> Answer:
        """The same of tensors that are broadcast, from SGLang 0.5.21 on."""
        return self._update("load_weights_from_distributed", *args, **kwargs)

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> Answer:
        """The same of tensors in another process's memory."""
        return self._update("update_weights_from_ipc", *args, **kwargs)

    def end_weight_update(self, *args: Any, **kwargs: Any) -> Any:
        """The end of a session, in which others may have written to the weights."""
        self._drafter.target_changed = True
        return self._native.end_weight_update(*args, **kwargs)


class DraftUpdater(Updater):
    """Of the drafter's runner, from SGLang 0.5.21 on.

    A session neither takes the drafter's weights apart nor puts them together.
    """

    def begin_weight_update(self) -> None:
        """Nothing to do."""

    def end_weight_update(self, *, run_post_load: bool) -> None:
        """Nothing to do."""

    def update_weights_from_disk(self, model_path: str, *_: Any, **__: Any) -> Answer:
        """Load a drafter's checkpoint."""
        return answered(_replaced, self._drafter, Path(model_path))

    def update_weights_from_tensor(
        self, named_tensors: Any, load_format: str | None = None
    ) -> Answer:
        """Load tensors by their names in the checkpoint."""
        if load_format not in (None, "flattened_bucket"):
            return False, (
                f"the drafter keeps its weights: load_format is {load_format!r}, which writes past "
                "its loader; leave it out"
            )
        return answered(self._native.update_weights_from_tensor, named_tensors, load_format)

    def load_weights_from_distributed(self, named_tensors: Any) -> Answer:
        """The same of tensors that are broadcast."""
        return answered(self._native.load_weights_from_distributed, named_tensors)

    def update_weights_from_ipc(self, recv_req: Any) -> Answer:
        """The same of tensors in another process's memory."""
        return answered(self._native.update_weights_from_ipc, recv_req)


def _replaced(drafter: Any, directory: Path) -> Answer:
    take_checkpoint(drafter, directory)
    return True, REPLACED


def select_runners(native: Callable[..., Any], manager: Any, selector: str = "all") -> Any:
    """Runners of an update; of those for both, the target's alone, which passes ``draft.`` on.

    A drafter would take the target's tensors for its own, by their names.
    """
    if selector == "all" and isinstance(manager.draft_worker, Counted):
        selector = "target"
    return native(manager, selector)


def update_when_idle(native: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
    """Update weights, or refuse while requests run whose cache the update would have to empty.

    SGLang up to 0.5.20 ends there, once the new weights are loaded.
    """
    is_ours = isinstance(manager.draft_worker, Counted)
    if not is_ours or not recv_req.flush_cache or manager.is_fully_idle():
        return native(manager, recv_req)
    from sglang.srt.managers import io_struct

    name = type(recv_req).__name__.removesuffix("Input") + "Output"
    logger.error(BUSY)
    return getattr(io_struct, name)(success=False, message=BUSY)


def resume_memory(native: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
    """Give memory back to the models, and the drafter its weights where they are lost."""
    answer = native(manager, recv_req)
    resumes = not recv_req.tags or WEIGHTS in recv_req.tags
    if resumes and isinstance(manager.draft_worker, Counted):
        _restore_lost(manager.draft_worker)
    return answer


def _restore_lost(worker: Any) -> None:
    if _loses_weights(worker.server_args):
        restore(worker.draft_model)


def check_restorable(server_args: Any, drafter: Any) -> None:
    """Refuse, at start, memory that may be given back with weights that would stay lost.

    Args:
        server_args: SGLang's.
        drafter: the draft model, with its weights.

    Raises:
        DFlashError: names the flags.
    """
    if _loses_weights(server_args):
        refuse_to_lose(drafter, "--enable-memory-saver loses weights: add " + " or ".join(FLAGS))


def _loses_weights(server_args: Any) -> bool:
    kept = any(argument(server_args, backup) for backup in BACKUPS)
    return bool(argument(server_args, "enable_memory_saver")) and not kept


def keep_model_path(native: Callable[..., Any], manager: Any, model_path: str, *args: Any) -> Any:
    """Note the path of the model that is served, unless it is a drafter's."""
    return None if holds_drafter(model_path) else native(manager, model_path, *args)
