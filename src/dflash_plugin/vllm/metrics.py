"""Metrics under ``dflash:``, and the warning when a drafter accepts far less than it should.

vLLM's own counters (``vllm:spec_decode_*``) stay as they are. Both are fed by the same statistics;
those of one step go to one API server. Counts of adaptive verification travel with them: from the
runner's output to the scheduler, and to the API server in a field of their own beside vLLM's
statistics, which vLLM's other loggers never see. What the drafter takes of the KV cache goes the
same way, once, and so do the facts that its workers know.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache, wraps
from typing import Any

from dflash_plugin.adaptive.policy import growth
from dflash_plugin.serving.acceptance import AcceptanceWatch
from dflash_plugin.serving.drafter_spec import DrafterSpec
from dflash_plugin.serving.prometheus import (
    cache_gauges,
    collectors,
    count_budget,
    engine_info,
    introduce,
    worker_info,
)
from dflash_plugin.vllm.adaptive import of_runner
from dflash_plugin.vllm.options import drafter_spec, required_spec
from dflash_plugin.vllm.protocols import (
    EngineCoreOutputs,
    Method,
    SchedulerStats,
    SpecDecodingStats,
    SpeculativeConfig,
    VllmConfig,
)
from dflash_plugin.vllm.surface import ATTACHED, TOLD, UNSENT, attach, attached
from dflash_plugin.vllm.worker_facts import read_facts

logger = logging.getLogger("vllm.dflash_plugin")

# Steps after which counts are sent: to export those of one takes longer than to choose for it.
SENT_AFTER = 32


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
        self.cache = cache_gauges(self.labels)
        for names in values.values():
            introduce(made, spec, names)

    def observe(self, stats: SpecDecodingStats, engine: int) -> None:
        """Take one step's acceptance."""
        watch = self.watches[engine]
        warning = watch.observe(stats.num_drafts, list(stats.num_accepted_tokens_per_pos))
        if watch.passes or watch.acceptance_length is None:
            return  # The window goes on.
        self.length.labels(*self.values[engine]).set(watch.acceptance_length)
        if warning is not None:
            self.warnings.labels(*self.values[engine]).inc()
            if watch.warnings == 1 or watch.warnings % 10 == 0:
                logger.warning("%s", warning)

    def observe_counts(self, stats: SchedulerStats, engine: int) -> None:
        """Take the counts that ``send_counts`` sent with one step's statistics."""
        counts, names = attached(stats), self.values[engine]
        if not counts:
            return
        attach(stats, {})
        for name in self.cache.keys() & counts:
            self.cache[name].labels(*names).set(counts[name])
        facts = read_facts(counts)
        if facts:
            worker_info(self.labels).labels(*names, *facts.values()).set(1)
        known = {*self.cache, *(f"{name}:{value}" for name, value in facts.items())}
        increases = {name: count for name, count in counts.items() if name not in known}
        if increases:
            count_budget(self.labels, names, increases)


def attach_counts(native: Method) -> Method:
    """``Worker.sample_tokens`` that attaches the worker's facts and the policy's counts.

    They go with the part of a step's output that reaches the scheduler, which either runner may
    wrap.
    """

    @wraps(native)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, kept = native(self, *args, **kwargs), vars(self)
        ours = of_runner(self.model_runner)
        facts = kept.get(ATTACHED) or {}
        # Steps that bypass the choice count nothing.
        news = (len(facts), 0 if ours is None else ours.steps)
        if output is None or kept.get(TOLD, (0, 0)) == news:
            return output
        kept[TOLD] = news
        counts = facts if ours is None else {**facts, **ours.policy.counts()}
        parts = vars(output)
        inner = parts.get("model_runner_output") or parts.get("_model_runner_output")
        attach(inner or output, counts)
        return output

    return sample_tokens


class Unsent:
    """Counts on their way to the API servers.

    Args:
        cache: what the drafter takes of the cache.
    """

    def __init__(self, cache: dict[str, int] | None) -> None:
        self._fixed = cache or {}
        self._counts: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._is_new, self._steps = bool(cache), 0

    def note(self, counts: dict[str, int] | None) -> None:
        """Take the counts of a step, if it has any."""
        self._steps += 1
        if counts:
            self._counts, self._is_new = counts, True

    def is_due(self, running: Sequence[Any]) -> bool:
        """Whether to send now: what is new, first, then in some steps and in the last one.

        Args:
            running: requests that go on.
        """
        return self._is_new and (not self._sent or not running or self._steps >= SENT_AFTER)

    def take(self) -> dict[str, int]:
        """What has grown since it was sent, which counts as sent now."""
        grown = {**growth(self._counts, self._sent), **self._fixed}
        self._sent, self._fixed = self._counts, {}
        self._is_new, self._steps = False, 0
        return grown


def send_counts(native: Method) -> Method:
    """``Scheduler.update_from_output`` that sends the counts' growth with a step's statistics."""

    @wraps(native)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs: dict[int, EngineCoreOutputs] = native(self, scheduler_output, model_runner_output)
        unsent: Unsent | None = vars(self).get(UNSENT)
        if unsent is None:
            unsent = vars(self)[UNSENT] = Unsent(attached(self.vllm_config))
        unsent.note(attached(model_runner_output))
        if not unsent.is_due(self.running):
            return outputs
        told = next((client for client, one in outputs.items() if one.scheduler_stats), None)
        if told is not None and (grown := unsent.take()):
            one = outputs[told]
            fields = [getattr(one, name) for name in one.__struct_fields__]
            outputs[told] = carrying_counts(type(one))(*fields, grown)
        return outputs

    return update_from_output


@cache
def carrying_counts(native: Any) -> Any:
    """``EngineCoreOutputs``, what one step sends to one API server, with a field for the counts.

    It comes last in the message, where a receiver that does not know it ignores it.
    """

    class CountedOutputs(native):
        dflash: dict[str, int] | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.dflash and self.scheduler_stats is not None:
                attach(self.scheduler_stats, self.dflash)

    return CountedOutputs


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
            ours.observe_counts(scheduler_stats, engine_idx)
        native(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)

    return record


def tell_setup(native: Method) -> Method:
    """``PrometheusStatLogger.__init__`` that also tells how the engine runs the drafter."""

    @wraps(native)
    def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        native(self, vllm_config, *args, **kwargs)
        ours = vars(self.spec_decoding_prom).get("dflash")
        if ours:
            facts = engine_facts(vllm_config)
            gauge = engine_info(ours.labels, tuple(facts))
            for values in ours.values.values():
                gauge.labels(*values, *facts.values()).set(1)

    return init


def engine_facts(vllm_config: VllmConfig) -> dict[str, str]:
    """How the engine runs the drafter, as labels; doctor reads them."""
    selector = required_spec(vllm_config).config.selector
    return {
        "runner": "v2" if vllm_config.use_v2_model_runner else "v1",
        "selector": "none" if selector is None else "yes",
        "multimodal": "yes" if vllm_config.model_config.is_multimodal_model else "no",
    }


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
