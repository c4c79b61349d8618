"""Metrics under ``dflash:``, and the warning when a drafter accepts far less than it should.

vLLM's own counters (``vllm:spec_decode_*``) stay as they are; both are fed by the same statistics.
"""

from __future__ import annotations

import logging
from functools import cache, wraps
from importlib.metadata import version
from typing import Any

from dflash_plugin.vllm.options import Hosted, hosted

logger = logging.getLogger("vllm.dflash_plugin")


class AcceptanceWatch:
    """Judges acceptance over windows of verify passes.

    Args:
        info: the drafter, with its expectation and options.
    """

    def __init__(self, info: Hosted) -> None:
        self.expected = info.expected_acceptance_length
        self.share = info.options.acceptance_warning
        self.window = info.options.acceptance_window
        self.passes = 0
        self.accepted: list[int] = []
        self.acceptance_length: float | None = None
        self.warnings = 0

    def observe(self, passes: int, accepted_by_position: list[int]) -> str | None:
        """Add verify passes; what to warn of at the end of a window that went badly.

        Args:
            passes: verify passes.
            accepted_by_position: how many of them accepted the draft at each position.
        """
        self.passes += passes
        old = self.accepted or [0] * len(accepted_by_position)
        self.accepted = [a + b for a, b in zip(old, accepted_by_position, strict=True)]
        if self.passes < self.window:
            return None
        rates = [count / self.passes for count in self.accepted]
        self.acceptance_length = 1 + sum(rates)
        self.passes, self.accepted = 0, []
        if self.expected is None or sum(rates) >= self.share * (self.expected - 1):
            return None
        self.warnings += 1
        return (
            f"acceptance length is {self.acceptance_length:.2f} over the last {self.window} "
            f"verify passes, the drafter's own record is {self.expected:.2f}: {likely(rates)}"
        )


def likely(rates: list[float]) -> str:
    """The likely cause of low acceptance, from the share of passes accepting each position."""
    if rates[0] < 0.1:
        return (
            "hardly any first draft is accepted, so the drafter probably belongs to another "
            "target, or to another revision or quantisation of it; `dflash-plugin inspect "
            "DRAFTER --target TARGET --replay` compares the two"
        )
    if len(rates) > 1 and rates[1] < 0.3 * rates[0]:
        return (
            "the first draft is accepted but what follows is not, so rotation, window, mask token "
            "or block size probably differ from training; `dflash-plugin inspect` lists them"
        )
    return (
        "all positions are low, so the traffic is probably unlike the training text (chat "
        "template, thinking mode, language, high temperature); train the drafter on such text"
    )


@cache
def _collectors(labels: tuple[str, ...]) -> dict[str, Any]:
    """Ours, made once in a process: the registry refuses a second of the same name."""
    from prometheus_client import Counter, Gauge

    def gauge(name: str, text: str, more: tuple[str, ...] = ()) -> Any:
        return Gauge(name, text, [*labels, *more], multiprocess_mode="mostrecent")

    return {
        "length": gauge(
            "dflash:acceptance_length",
            "Tokens committed per verify pass, bonus token included, over the last window.",
        ),
        "expected": gauge(
            "dflash:expected_acceptance_length", "What the drafter's record promises."
        ),
        "info": gauge("dflash:drafter_info", "The drafter.", ("plugin", "dialect", "block_size")),
        "warnings": Counter(
            "dflash:acceptance_warnings", "Windows with acceptance far too low.", labels
        ),
    }


class Metrics:
    """Gauges and counters of one engine process."""

    def __init__(self, info: Hosted, labels: list[str], values: dict[int, list[object]]) -> None:
        self.watches = {engine: AcceptanceWatch(info) for engine in values}
        self.values = values
        made = _collectors(tuple(labels))
        self.length, self.warnings = made["length"], made["warnings"]
        for names in values.values():
            made["info"].labels(
                *names,
                version("dflash-plugin"),
                info.config.dialect,
                str(info.config.block_size),
            ).set(1)
            if info.expected_acceptance_length is not None:
                made["expected"].labels(*names).set(info.expected_acceptance_length)
            self.warnings.labels(*names).inc(0)

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
        info = hosted(speculative_config)
        self.dflash = info and Metrics(info, labelnames, per_engine_labelvalues)

    @wraps(observe)
    def new_observe(self: Any, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
        observe(self, spec_decoding_stats, engine_idx)
        if self.dflash:
            self.dflash.observe(spec_decoding_stats, engine_idx)

    prometheus.__init__, prometheus.observe = new_init, new_observe
