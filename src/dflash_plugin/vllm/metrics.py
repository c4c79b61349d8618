"""Metrics under ``dflash:``, and the warning when a drafter accepts far less than it should.

vLLM's own counters (``vllm:spec_decode_*``) stay as they are; both are fed by the same statistics,
of which each step's go to one API server. What a budget chooses goes with them: at the runner's
output to the scheduler, and on to the API server in a field of vLLM's that is free.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from dflash_plugin.adaptive.policy import growth
from dflash_plugin.serving.acceptance import AcceptanceWatch
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.prometheus import collectors, count_budget, introduce
from dflash_plugin.vllm.options import drafter_spec

logger = logging.getLogger("vllm.dflash_plugin")

# Marks, among a step's statistics, what a budget has chosen.
PREFIX = "dflash:"


class Metrics:
    """Gauges and counters of one engine process."""

    def __init__(
        self, info: DrafterSpec, labels: list[str], values: dict[int, list[object]]
    ) -> None:
        self.watches = {engine: AcceptanceWatch(info) for engine in values}
        self.labels, self.values = tuple(labels), values
        made = collectors(self.labels)
        self.length, self.warnings = made["length"], made["warnings"]
        for names in values.values():
            introduce(made, info, names)

    def observe(self, stats: Any, engine: int) -> None:
        """Take one step's ``SpecDecodingStats``."""
        watch = self.watches[engine]
        warning = watch.observe(stats.num_drafts, list(stats.num_accepted_tokens_per_pos))
        if watch.acceptance_length is not None:
            self.length.labels(*self.values[engine]).set(watch.acceptance_length)
        if warning is not None:
            self.warnings.labels(*self.values[engine]).inc()
            if watch.warnings == 1 or watch.warnings % 10 == 0:
                logger.warning("%s", warning)

    def observe_budget(self, stats: Any, engine: int) -> None:
        """Take what ``patch_scheduler`` put into one step's ``SchedulerStats``."""
        carrier = stats.waiting_lora_adapters
        names = [name for name in carrier if name.startswith(PREFIX)]
        if names:
            grown = {name.removeprefix(PREFIX): carrier.pop(name) for name in names}
            count_budget(self.labels, self.values[engine], grown)


def patch_runner(runner: Any) -> None:
    """Attach what a budget of ours has chosen so far to the output of each step."""
    sample = runner.sample_tokens

    @wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample(self, *args, **kwargs)
        policy = getattr(self.adaptive_verification, "policy", None)
        if policy is not None and output is not None:
            output.model_runner_output.dflash_counts = policy.counts()
        return output

    runner.sample_tokens = sample_tokens


def patch_scheduler(scheduler: Any) -> None:
    """Send by how much what was attached has grown, along with a step's statistics.

    Fields that vLLM does not know are lost on the way. The one that is used is empty: vLLM refuses
    adaptive verification with LoRA.
    """
    update = scheduler.update_from_output

    @wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = update(self, scheduler_output, model_runner_output)
        counts = getattr(model_runner_output, "dflash_counts", None)
        stats = next((one.scheduler_stats for one in outputs.values() if one.scheduler_stats), None)
        if counts and stats:
            grown = growth(counts, getattr(self, "dflash_counts", {}))
            stats.waiting_lora_adapters.update({PREFIX + name: n for name, n in grown.items()})
            self.dflash_counts = counts
        return outputs

    scheduler.update_from_output = update_from_output


def patch_logger(prometheus: Any) -> None:
    """Count a budget's choices where ``PrometheusStatLogger`` takes a step's statistics."""
    record = prometheus.record

    @wraps(record)
    def new_record(
        self: Any, scheduler_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any
    ) -> None:
        ours = self.spec_decoding_prom.dflash
        if ours and scheduler_stats is not None:
            ours.observe_budget(scheduler_stats, engine_idx)
        record(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)

    prometheus.record = new_record


def patch(prometheus: Any) -> None:
    """Feed ours where ``SpecDecodingProm`` is fed."""
    init, observe = prometheus.__init__, prometheus.observe

    @wraps(init)
    def new_init(
        self: Any,
        speculative_config: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        init(self, speculative_config, labelnames, per_engine_labelvalues, *args, **kwargs)
        info = drafter_spec(speculative_config)
        self.dflash = info and Metrics(info, labelnames, per_engine_labelvalues)

    @wraps(observe)
    def new_observe(self: Any, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
        observe(self, spec_decoding_stats, engine_idx)
        if self.dflash:
            self.dflash.observe(spec_decoding_stats, engine_idx)

    prometheus.__init__, prometheus.observe = new_init, new_observe
