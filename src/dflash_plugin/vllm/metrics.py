"""Metrics under ``dflash:``, and the warning when a drafter accepts far less than it should.

vLLM's own counters (``vllm:spec_decode_*``) stay as they are; both are fed by the same statistics.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from dflash_plugin.serving.acceptance import AcceptanceWatch
from dflash_plugin.serving.hosted import Hosted
from dflash_plugin.serving.prometheus import collectors, introduce
from dflash_plugin.vllm.options import hosted

logger = logging.getLogger("vllm.dflash_plugin")


class Metrics:
    """Gauges and counters of one engine process."""

    def __init__(self, info: Hosted, labels: list[str], values: dict[int, list[object]]) -> None:
        self.watches = {engine: AcceptanceWatch(info) for engine in values}
        self.values = values
        made = collectors(tuple(labels))
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
