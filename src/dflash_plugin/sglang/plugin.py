"""Every hook of SGLang that the plugin registers, in one place.

``seams`` lists what each hook is on; ``patches`` holds what is replaced while our worker runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dflash_plugin.serving.variables import is_off
from dflash_plugin.sglang import compat, metrics
from dflash_plugin.sglang.arguments import (
    asks_for_dflash,
    handle_dflash,
    handle_speculative_decoding,
    refuse_version,
)
from dflash_plugin.sglang.names import ARCHITECTURE
from dflash_plugin.sglang.options import draft_model_path, drafter_spec
from dflash_plugin.sglang.seams.features import ADAPTIVE, ALWAYS, ARGUMENTS
from dflash_plugin.sglang.seams.new_weights import UPDATES
from dflash_plugin.sglang.surface import (
    hooks,
    surface,
    verify_features,
    verify_hooks,
    verify_objects,
)


def _before_arguments(native: Callable[..., Any], server_args: Any) -> Any:
    """Check the hooks of all processes before any of them is relied on."""
    if asks_for_dflash(compat.argument(server_args, "speculative_algorithm")):
        verify_hooks()
        verify_features({ARGUMENTS})
    return handle_speculative_decoding(native, server_args)


def _worker(native: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
    """Return our worker class where the drafter is one that the plugin staged."""
    worker = native(algorithm, server_args)
    if not algorithm.is_dflash() or drafter_spec(draft_model_path(server_args)) is None:
        return worker
    from dflash_plugin.sglang.worker import Worker

    return Worker


def _before_event_loop(native: Callable[..., Any], scheduler: Any) -> Any:
    """Check the drafter when everything is warm, before the first request."""
    worker = scheduler.draft_worker
    if isinstance(worker, metrics.Counted):
        from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

        from dflash_plugin.sglang.selfcheck import check

        _verify_objects(scheduler, worker)
        check(scheduler, worker.info)
        if worker.verifier is not None and not worker.verifier.whole_blocks:
            from dflash_plugin.sglang.waiting_prompts import let_prompts_wait

            let_prompts_wait(scheduler, worker.verifier)
        # All ranks accept the same drafts, and Prometheus would add up what each rank exports.
        if get_tensor_model_parallel_rank() == 0:
            metrics.start(worker, scheduler.server_args)
    return native(scheduler)


def _verify_objects(scheduler: Any, worker: Any) -> None:
    features = ALWAYS if worker.verifier is None else ALWAYS | {ADAPTIVE}
    target = worker.target_worker
    runners = target.model_runner, worker.draft_model_runner
    objects = (scheduler, worker, target, *runners, target.model_runner.model_config)
    verify_objects(features, *objects)


def _imported_late(module: str, name: str) -> Callable[..., Any]:
    """A hook of a module of this package that is imported when the hook is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"dflash_plugin.sglang.{module}"), name)(*args, **kwargs)

    return call


# By the names in the table of ``seams``.
AROUND: dict[str, Callable[..., Any]] = {
    "handle_speculative_decoding": _before_arguments,
    "_handle_dflash": handle_dflash,
    "SpeculativeAlgorithm.create_worker": _worker,
    "dispatch_event_loop": _before_event_loop,
    "Scheduler.get_internal_state": metrics.describe_internal_state,
    "SchedulerBatchResultProcessor._resolve_spec_v2_tokens": metrics.count_accepted,
    "TokenizerManager._calculate_spec_decoding_metrics": metrics.describe_acceptance,
    "TokenizerManager._update_model_path_info": _imported_late("new_weights", "keep_model_path"),
    "TokenizerManager._send_one_request": _imported_late("answers", "spread_seeds"),
    "SchedulerWeightUpdaterManager._select_runners": _imported_late(
        "new_weights", "select_runners"
    ),
    **{update: _imported_late("new_weights", "update_when_idle") for update in UPDATES},
    "SchedulerWeightUpdaterManager.resume_memory_occupation": _imported_late(
        "new_weights", "resume_memory"
    ),
}


def activate() -> None:
    """Register the hooks, and our draft model where a DFlash drafter is asked for.

    An unsupported version is left as it is, and stops only when DFlash is asked for: the plugin
    must not break servers that do not use it.
    """
    if is_off():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if compat.row() is None:
        target = "sglang.srt.server_args.ServerArgs.__post_init__"
        HookRegistry.register(target, refuse_version, HookType.BEFORE)
        return
    for seam in hooks():
        HookRegistry.register(seam.name, AROUND[seam.symbol], HookType.AROUND)
    surface().patch("sglang.srt.models.registry", "ModelRegistry", _register_architecture)


def _register_architecture(registry: Any) -> None:
    from dflash_plugin.sglang.model import EngineDrafter

    registry.models[ARCHITECTURE] = EngineDrafter
