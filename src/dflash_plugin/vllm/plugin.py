"""What the plugin changes in vLLM, in one place."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from dflash_plugin.serving.after_import import after_import
from dflash_plugin.serving.drafter_spec import is_off
from dflash_plugin.vllm import compat
from dflash_plugin.vllm.names import ARCHITECTURE, LOAD_FORMAT
from dflash_plugin.vllm.options import drafter_spec


def activate() -> None:
    """Add the flags, and put this project's drafter where a DFlash drafter is asked for.

    An unsupported version is left as it is and stops only when a DFlash drafter is asked for: the
    plugin must not break engines that do not use it.
    """
    after_import("vllm.engine.arg_utils", _patch_arguments)
    version = compat.row()
    if is_off() or version is None:
        return
    after_import("vllm.model_executor.models.registry", _register_architecture)
    after_import("vllm.model_executor.model_loader", _register_loader)
    after_import("vllm.v1.worker.gpu.spec_decode.dflash.speculator", _substitute_speculator)
    after_import("vllm.v1.spec_decode.dflash", _substitute_proposer)
    after_import("vllm.v1.worker.gpu.model_runner", _replace_budget)
    after_import("vllm.v1.worker.gpu_worker", _extend_worker)
    after_import("vllm.v1.worker.cpu_worker", _extend_worker)
    after_import("vllm.v1.spec_decode.metrics", _add_metrics)
    after_import("vllm.v1.core.sched.scheduler", _send_budget)
    after_import("vllm.v1.metrics.loggers", _count_budget)
    if version.cpu_expands_into_copy:
        after_import("vllm.utils.cpu_triton_utils", _mend_cpu_kernels)
    if version.top_k_needs_drafts:
        after_import("vllm.v1.sample.rejection_sampler", _mend_rejection_sampler)


def _patch_arguments(module: ModuleType) -> None:
    from dflash_plugin.vllm.arguments import patch

    patch(module)


def _register_architecture(module: ModuleType) -> None:
    module.ModelRegistry.register_model(ARCHITECTURE, "dflash_plugin.vllm.model:EngineDrafter")


def _register_loader(module: ModuleType) -> None:
    from dflash_plugin.vllm.loader import DrafterLoader

    module.register_model_loader(LOAD_FORMAT)(DrafterLoader)


def _substitute_speculator(module: ModuleType) -> None:
    from dflash_plugin.vllm.speculator import Speculator

    _substitute(module.DFlashSpeculator, Speculator)


def _substitute_proposer(module: ModuleType) -> None:
    from dflash_plugin.vllm.proposer import Proposer

    _substitute(module.DFlashProposer, Proposer)


def _substitute(native: Any, ours: Any) -> None:
    """Make ``native(vllm_config, …)`` build ``ours``, its subclass, for a drafter that is ours.

    The name stays bound to the native class wherever it was imported, and its other subclasses
    are left alone.
    """

    def new(cls: Any, vllm_config: Any, *_: Any, **__: Any) -> Any:
        is_ours = cls is native and drafter_spec(vllm_config.speculative_config) is not None
        return object.__new__(ours if is_ours else cls)

    native.__new__ = new


def _replace_budget(module: ModuleType) -> None:
    from dflash_plugin.vllm.adaptive import patch
    from dflash_plugin.vllm.metrics import patch_runner

    runner: Any = module
    patch(runner)
    patch_runner(runner.GPUModelRunner)


def _extend_worker(module: ModuleType) -> None:
    from dflash_plugin.vllm import adaptive, selfcheck

    worker: Any = getattr(module, "CPUWorker", None) or module.Worker
    selfcheck.patch(worker)
    worker.dflash_adaptive = adaptive.of_worker


def _add_metrics(module: ModuleType) -> None:
    from dflash_plugin.vllm.metrics import patch

    patch(module.SpecDecodingProm)


def _send_budget(module: ModuleType) -> None:
    from dflash_plugin.vllm.metrics import patch_scheduler

    patch_scheduler(module.Scheduler)


def _count_budget(module: ModuleType) -> None:
    from dflash_plugin.vllm.metrics import patch_logger

    patch_logger(module.PrometheusStatLogger)


def _mend_cpu_kernels(module: ModuleType) -> None:
    from dflash_plugin.vllm.workarounds import expand_kernel

    module._expand_kernel_impl = expand_kernel  # type: ignore[attr-defined]


def _mend_rejection_sampler(module: ModuleType) -> None:
    from dflash_plugin.vllm.workarounds import without_empty_rows

    sampler: Any = module
    sampler.apply_sampling_constraints = without_empty_rows(sampler.apply_sampling_constraints)
