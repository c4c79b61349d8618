"""What the plugin changes in SGLang, in one place."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.after_import import after_import
from dflash_plugin.serving.drafter_spec import is_off
from dflash_plugin.sglang import compat, metrics
from dflash_plugin.sglang.arguments import (
    asks_for_dflash,
    handle_dflash,
    handle_speculative_decoding,
    refuse_version,
)
from dflash_plugin.sglang.names import ARCHITECTURE
from dflash_plugin.sglang.options import DrafterSpec, draft_model_path, drafter_spec

_SRT = "sglang.srt."


def _before_arguments(native: Callable[..., Any], server_args: Any) -> Any:
    """Check the hooks before any of them is relied on."""
    if asks_for_dflash(compat.argument(server_args, "speculative_algorithm")):
        require_hooks(AROUND)
    return handle_speculative_decoding(native, server_args)


def _worker(native: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
    """The worker class of a speculative algorithm: ours for a drafter that is ours."""
    worker = native(algorithm, server_args)
    if not algorithm.is_dflash() or drafter_spec(draft_model_path(server_args)) is None:
        return worker
    from dflash_plugin.sglang.worker import Worker

    return Worker


def _before_event_loop(native: Callable[..., Any], scheduler: Any) -> Any:
    """The start-up check, when everything is warm and no request has come."""
    worker = getattr(scheduler, "draft_worker", None)
    info = getattr(worker, "info", None)
    if worker is not None and isinstance(info, DrafterSpec):
        from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

        from dflash_plugin.sglang.selfcheck import check

        check(scheduler, info)
        # All ranks accept the same; what each exported would be added up.
        if get_tensor_model_parallel_rank() == 0:
            metrics.start(info, scheduler.server_args, worker.num_drafts)
    return native(scheduler)


AROUND: dict[str, Callable[..., Any]] = {
    f"{_SRT}arg_groups.speculative_hook.handle_speculative_decoding": _before_arguments,
    f"{_SRT}arg_groups.speculative_hook._handle_dflash": handle_dflash,
    f"{_SRT}speculative.spec_info.SpeculativeAlgorithm.create_worker": _worker,
    f"{_SRT}managers.scheduler.dispatch_event_loop": _before_event_loop,
    f"{_SRT}managers.scheduler.Scheduler.get_internal_state": metrics.describe_internal_state,
    f"{_SRT}managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._resolve_spec_v2_tokens": metrics.count_accepted,
    f"{_SRT}managers.tokenizer_manager.TokenizerManager._calculate_spec_decoding_metrics": (
        metrics.describe_acceptance
    ),
}


def activate() -> None:
    """Register the hooks, and put this project's drafter where a DFlash drafter is asked for.

    An unsupported version is left as it is and stops only when DFlash is asked for: the plugin must
    not break servers that do not use it.
    """
    if is_off():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if compat.row() is None:
        target = f"{_SRT}server_args.ServerArgs.__post_init__"
        HookRegistry.register(target, refuse_version, HookType.BEFORE)
        return
    for target, hook in AROUND.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    after_import(f"{_SRT}models.registry", _register_architecture)


def require_hooks(targets: Iterable[str]) -> None:
    """Check that SGLang applied the hooks; it only logs a hook that it cannot apply.

    Args:
        targets: dotted names of the hooked functions.

    Raises:
        DFlashError: one is missing.
    """
    missing = [name for name in targets if not hasattr(pkgutil.resolve_name(name), "__wrapped__")]
    if missing:
        raise DFlashError(
            f"SGLang {compat.installed()} did not take the hooks on {', '.join(missing)}: its log "
            "above says why; install a supported version as it was published, or set "
            "DFLASH_PLUGIN=off"
        )


def _register_architecture(module: ModuleType) -> None:
    from dflash_plugin.sglang.model import EngineDrafter

    registry: Any = module.ModelRegistry
    registry.models[ARCHITECTURE] = EngineDrafter
