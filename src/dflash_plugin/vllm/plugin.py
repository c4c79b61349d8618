"""What the plugin changes in vLLM: each patch, and the function that makes it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dflash_plugin.serving.variables import is_off
from dflash_plugin.vllm import compat
from dflash_plugin.vllm import surface as vllm
from dflash_plugin.vllm.names import ARCHITECTURE, LOAD_FORMAT
from dflash_plugin.vllm.options import drafter_spec

# vLLM's module and symbol, and the function that gets the native object and returns its
# replacement: "module:function" of this package, imported when vLLM's module is.
FLAGS = (
    (vllm.ARG_UTILS, "EngineArgs.add_cli_args", "arguments:add_cli_args"),
    (vllm.ARG_UTILS, "EngineArgs.create_speculative_config", "arguments:create_speculative_config"),
)
PATCHES = (
    (vllm.ARG_UTILS, "EngineArgs.create_engine_config", "arguments:create_engine_config"),
    (
        vllm.ARG_UTILS,
        "maybe_override_with_speculators",
        "arguments:maybe_override_with_speculators",
    ),
    (vllm.REGISTRY, "ModelRegistry", "plugin:register_architecture"),
    (vllm.LOADERS, "register_model_loader", "plugin:register_loader"),
    (vllm.SPECULATOR, "DFlashSpeculator", "plugin:substitute_speculator"),
    (vllm.PROPOSER, "DFlashProposer", "plugin:substitute_proposer"),
    (vllm.WORKER, "Worker", "plugin:extend_worker"),
    (vllm.WORKER, "Worker.compile_or_warm_up_model", "selfcheck:checked_when_warm"),
    (vllm.CPU_WORKER, "CPUWorker.compile_or_warm_up_model", "selfcheck:checked_when_warm"),
    (vllm.WORKER, "Worker._set_draft_weight_update_target", "new_weights:receive_draft_weights"),
    (vllm.WORKER, "Worker.finish_weight_update", "new_weights:note_target_change"),
    (vllm.WORKER, "Worker.reload_weights", "new_weights:note_target_change"),
    (vllm.WORKER, "Worker.sleep", "new_weights:note_sleep"),
    (vllm.WORKER, "Worker.wake_up", "new_weights:restore_when_awake"),
    (vllm.RUNNER, "GPUModelRunner.__init__", "adaptive_default:turned_on_where_able"),
    (vllm.RUNNER, "GPUModelRunner.load_model", "sampling_states:give_limits"),
    (vllm.RUNNER, "GPUModelRunner.prepare_inputs", "prepared_inputs:prepare"),
    (vllm.LORA, "LoraState.make_lora_inputs", "lora:repeat_for_rows"),
    (vllm.GRAPHS, "ModelCudaGraphManager.capture", "prompt_graphs:capture_prompts"),
    (vllm.RUNNER, "maybe_create_adaptive_verification_manager", "adaptive:create_manager"),
    (vllm.WORKER, "Worker.sample_tokens", "metrics:attach_counts"),
    (vllm.CACHE_UTILS, "get_kv_cache_groups", "cache_groups:keep_target_groups"),
    (vllm.CACHE_PLANNING, "get_kv_cache_groups", "cache_groups:keep_target_groups"),
    (
        vllm.NIXL_METADATA,
        "_get_speculative_compatibility_factors",
        "kv_transfer:compare_drafters",
    ),
    (vllm.ENGINE_CORE, "update_kv_cache_capacity", "cache_capacity:report_capacity"),
    (
        vllm.ENGINE_CORE,
        "EngineCore._should_throttle_prefills",
        "waiting_prompts:hold_prompts_back",
    ),
    (vllm.SCHEDULER, "Scheduler.update_from_output", "metrics:send_counts"),
    (vllm.CORE_CLIENT, "EngineCoreOutputs", "metrics:carrying_counts"),
    (vllm.LOGGERS, "PrometheusStatLogger.record", "metrics:export_counts"),
    (vllm.LOGGERS, "PrometheusStatLogger.__init__", "metrics:tell_setup"),
    (vllm.SPEC_METRICS, "SpecDecodingProm.__init__", "metrics:make_metrics"),
    (vllm.SPEC_METRICS, "SpecDecodingProm.observe", "metrics:feed_metrics"),
    (vllm.CPU_KERNELS, "_expand_kernel_impl", "workarounds:expand_in_place"),
    (vllm.REJECTION, "apply_sampling_constraints", "workarounds:without_empty_rows"),
)


def activate() -> None:
    """Add the flags, and put this project's drafter where a DFlash drafter is asked for.

    An unsupported version is left as it is and stops only when a DFlash drafter is asked for: the
    plugin must not break engines that do not use it.
    """
    in_use = FLAGS if is_off() or compat.row() is None else FLAGS + PATCHES
    for module, symbol, maker in in_use:
        vllm.surface().patch(module, symbol, _imported_late(maker))


def _imported_late(maker: str) -> Callable[[Any], Any]:
    """A function of this package that is imported when it is called."""
    module, _, function = maker.partition(":")

    def make(native: Any) -> Any:
        return getattr(import_module(f"dflash_plugin.vllm.{module}"), function)(native)

    return make


def extend_worker(worker: Any) -> None:
    """Add what ``collective_rpc`` calls by name, and a mark of ours, to vLLM's worker class."""
    from dflash_plugin.vllm import adaptive, new_weights

    worker.dflash_adaptive = adaptive.of_worker
    worker.reload_draft_weights = new_weights.reload_draft_weights
    worker.dflash_weights_lost = False


def register_architecture(registry: Any) -> None:
    """Register the drafter under its architecture's name."""
    registry.register_model(ARCHITECTURE, "dflash_plugin.vllm.model:EngineDrafter")


def register_loader(register_model_loader: Any) -> None:
    """Register the loader under its format's name."""
    from dflash_plugin.vllm.loader import DrafterLoader

    register_model_loader(LOAD_FORMAT)(DrafterLoader)


def substitute_speculator(native: type) -> None:
    """Make the V2 runner build this project's speculator."""
    from dflash_plugin.vllm.speculator import Speculator

    substitute(native, Speculator)


def substitute_proposer(native: type) -> None:
    """Make the V1 runner build this project's proposer."""
    from dflash_plugin.vllm.proposer import Proposer

    substitute(native, Proposer)


def substitute(native: Any, ours: type) -> None:
    """Make ``native(vllm_config, …)`` build ``ours``, its subclass, for the plugin's drafters.

    The name stays bound to the native class wherever it was imported, and its other subclasses
    are left alone.
    """

    def new(cls: Any, vllm_config: Any, *_: Any, **__: Any) -> Any:
        is_ours = cls is native and drafter_spec(vllm_config.speculative_config) is not None
        return object.__new__(ours if is_ours else cls)

    native.__new__ = new
