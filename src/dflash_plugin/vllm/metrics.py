"""Metrics under ``dflash:``, and the warning when a drafter accepts far less than it should.

vLLM's own counters (``vllm:spec_decode_*``) stay as they are. Both are fed by the same statistics;
those of one step go to one API server. Counts of adaptive verification travel with them: from the
runner's output to the scheduler, and to the API server in a field of vLLM's statistics that is
empty otherwise.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from dflash_plugin.adaptive.policy import growth
from dflash_plugin.serving.acceptance import AcceptanceWatch
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.prometheus import collectors, count_budget, introduce
from dflash_plugin.vllm.adaptive import AdaptiveManager
from dflash_plugin.vllm.options import drafter_spec
from dflash_plugin.vllm.protocols import (
    EngineCoreOutputs,
    Method,
    SchedulerStats,
    SpecDecodingStats,
    SpeculativeConfig,
)
from dflash_plugin.vllm.surface import attach, attached

logger = logging.getLogger("vllm.dflash_plugin")

# Marks the counts of adaptive verification among a step's statistics.
PREFIX = "dflash:"


class Metrics:
    """Gauges and counters of one API server process.

    Args:
        spec: the drafter.
        labels: vLLM's label names.
        values: their values, by the number of the engine.
    """

    def __init__(
        self, spec: DrafterSpec, labels: list[str], values: dict[int, list[object]]
    ) -> None:
        self.watches = {engine: AcceptanceWatch(spec) for engine in values}
        self.labels, self.values = tuple(labels), values
        made = collectors(self.labels)
        self.length, self.warnings = made["length"], made["warnings"]
        for names in values.values():
            introduce(made, spec, names)

    def observe(self, stats: SpecDecodingStats, engine: int) -> None:
        """Take one step's acceptance."""
        watch = self.watches[engine]
        warning = watch.observe(stats.num_drafts, list(stats.num_accepted_tokens_per_pos))
        if watch.acceptance_length is not None:
            self.length.labels(*self.values[engine]).set(watch.acceptance_length)
        if warning is not None:
            self.warnings.labels(*self.values[engine]).inc()
            if watch.warnings == 1 or watch.warnings % 10 == 0:
                logger.warning("%s", warning)

    def observe_adaptive(self, stats: SchedulerStats, engine: int) -> None:
        """Take the counts that ``send_counts`` put into one step's statistics."""
        carrier = stats.waiting_lora_adapters
        names = [name for name in carrier if name.startswith(PREFIX)]
        if names:
            increases = {name.removeprefix(PREFIX): carrier.pop(name) for name in names}
            count_budget(self.labels, self.values[engine], increases)


def attach_counts(native: Method) -> Method:
    """``GPUModelRunner.sample_tokens`` that attaches the policy's counts to a step's output."""

    @wraps(native)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = native(self, *args, **kwargs)
        manager = self.adaptive_verification
        if isinstance(manager, AdaptiveManager) and output is not None:
            attach(output.model_runner_output, manager.policy.counts())
        return output

    return sample_tokens


def send_counts(native: Method) -> Method:
    """``Scheduler.update_from_output`` that sends the counts' growth with a step's statistics.

    vLLM drops fields that it does not know on the way to the API server. The field that carries the
    counts is free, since vLLM refuses adaptive verification with LoRA.
    """

    @wraps(native)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs: dict[int, EngineCoreOutputs] = native(self, scheduler_output, model_runner_output)
        counts = attached(model_runner_output)
        stats = next((one.scheduler_stats for one in outputs.values() if one.scheduler_stats), None)
        if counts and stats:
            increases = growth(counts, attached(self) or {})
            stats.waiting_lora_adapters.update({PREFIX + name: n for name, n in increases.items()})
            attach(self, counts)
        return outputs

    return update_from_output


def export_counts(native: Method) -> Method:
    """``PrometheusStatLogger.record`` that exports the counts first."""

    @wraps(native)
    def record(
        self: Any,
        scheduler_stats: SchedulerStats | None,
        *args: Any,
        engine_idx: int = 0,
        **kwargs: Any,
    ) -> None:
        ours = vars(self.spec_decoding_prom).get("dflash")
        if ours and scheduler_stats is not None:
            ours.observe_adaptive(scheduler_stats, engine_idx)
        native(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)

    return record


def make_metrics(native: Method) -> Method:
    """``SpecDecodingProm.__init__`` that makes this project's metrics too."""

    @wraps(native)
    def init(
        self: Any,
        speculative_config: SpeculativeConfig | None,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        native(self, speculative_config, labelnames, per_engine_labelvalues, *args, **kwargs)
        spec = drafter_spec(speculative_config)
        self.dflash = spec and Metrics(spec, labelnames, per_engine_labelvalues)

    return init


def feed_metrics(native: Method) -> Method:
    """``SpecDecodingProm.observe`` that feeds this project's metrics too."""

    @wraps(native)
    def observe(self: Any, spec_decoding_stats: SpecDecodingStats, engine_idx: int = 0) -> None:
        native(self, spec_decoding_stats, engine_idx)
        ours = vars(self).get("dflash")
        if ours:
            ours.observe(spec_decoding_stats, engine_idx)

    return observe
