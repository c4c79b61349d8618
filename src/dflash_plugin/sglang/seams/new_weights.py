"""New weights of a running server."""

from __future__ import annotations

from dflash_plugin.sglang.seams.features import WEIGHTS
from dflash_plugin.sglang.seams.rows import rows

# What the scheduler does with a request for new weights.
UPDATES = tuple(
    f"SchedulerWeightUpdaterManager.update_weights_from_{source}"
    for source in ("disk", "distributed", "tensor", "ipc")
)
SOURCES = ("FromDisk", "sFromDistributed", "sFromTensor", "sFromIPC")
UPDATER = "model_executor.model_runner_components.weight_updater"

ROWS = (
    *rows(
        "managers.tokenizer_manager", "hook", WEIGHTS, "does not serve a drafter's path as a model",
        "TokenizerManager._update_model_path_info", signature=("model_path", "..."),
    ),
    *rows(
        "managers.scheduler_components.weight_updater", "hook", WEIGHTS,
        "keeps the target's tensors from the drafter",
        "SchedulerWeightUpdaterManager._select_runners", signature=("selector",), since="0.5.21",
    ),
    *rows(
        "managers.scheduler_components.weight_updater", "hook", WEIGHTS,
        "refuses new weights while requests run",
        *UPDATES, signature=("recv_req",), until="0.5.21",
    ),
    *rows(
        "managers.scheduler_components.weight_updater", "hook", WEIGHTS,
        "loads the drafter again whose memory was released",
        "SchedulerWeightUpdaterManager.resume_memory_occupation", signature=("recv_req",),
    ),
    *rows(
        "speculative.base_spec_worker", "subclass", WEIGHTS,
        "tells which of both models got new weights",
        "BaseSpecWorker.update_weights_from_disk", "BaseSpecWorker.update_weights_from_ipc",
        signature=("recv_req",), until="0.5.21",
    ),
    *rows(
        UPDATER, "subclass", WEIGHTS, "tells a drafter's directory from a target's",
        "WeightUpdater.update_weights_from_disk", signature=("model_path", "..."),
    ),
    *rows(
        UPDATER, "subclass", WEIGHTS, "lets the server survive weights that do not fit",
        "WeightUpdater.update_weights_from_tensor", signature=("named_tensors", "load_format"),
    ),
    *rows(
        UPDATER, "subclass", WEIGHTS, "lets the server survive weights that do not fit",
        "WeightUpdater.update_weights_from_ipc", signature=("recv_req",),
    ),
    *rows(
        UPDATER, "subclass", WEIGHTS, "lets the server survive weights that do not fit",
        "WeightUpdater.update_weights_from_distributed", signature=("...",), until="0.5.21",
    ),
    *rows(
        UPDATER, "subclass", WEIGHTS, "lets the server survive weights that do not fit",
        "WeightUpdater.load_weights_from_distributed", signature=("named_tensors",),
        since="0.5.21",
    ),
    *rows(
        UPDATER, "subclass", WEIGHTS, "leaves the drafter whole",
        "WeightUpdater.begin_weight_update", signature=(), since="0.5.21",
    ),
    *rows(
        UPDATER, "subclass", WEIGHTS, "leaves the drafter whole",
        "WeightUpdater.end_weight_update", signature=("*", "run_post_load"), since="0.5.21",
    ),
    *rows(
        "model_executor.model_runner", "attribute", WEIGHTS, "stands in front of its loaders",
        "ModelRunner.weight_updater",
    ),
    *rows(
        UPDATER, "attribute", WEIGHTS, "keeps the path of what is loaded",
        "WeightUpdater.model_config",
    ),
    *rows(
        "configs.model_config", "attribute", WEIGHTS, "keeps the path of what is loaded",
        "ModelConfig.model_path",
    ),
    *rows(
        "managers.scheduler_components.weight_updater", "attribute", WEIGHTS, "finds our worker",
        "SchedulerWeightUpdaterManager.draft_worker",
    ),
    *rows(
        "managers.io_struct", "attribute", WEIGHTS, "which model, and which memory",
        "UpdateWeightFromDiskReqInput.model_path", "ResumeMemoryOccupationReqInput.tags",
    ),
    *rows(
        "managers.io_struct", "attribute", WEIGHTS, "whether new weights empty the cache",
        *(f"UpdateWeight{source}ReqInput.flush_cache" for source in SOURCES), until="0.5.21",
    ),
    *rows(
        "managers.io_struct", "call", WEIGHTS, "refuses new weights while requests run",
        *(f"UpdateWeight{source}ReqOutput" for source in SOURCES), until="0.5.21",
    ),
    *rows(
        "managers.scheduler_components.weight_updater", "attribute", WEIGHTS,
        "whether requests run", "SchedulerWeightUpdaterManager.is_fully_idle", until="0.5.21",
    ),
)  # fmt: skip
