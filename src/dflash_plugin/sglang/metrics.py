"""Acceptance per request and position, in ``meta_info``, ``/server_info`` and Prometheus.

SGLang counts accepted drafts of each request in the scheduler; ours are fed where it does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

from dflash_plugin.adaptive.policy import growth
from dflash_plugin.decoding.acceptance import at_least, rates
from dflash_plugin.serving.acceptance import AcceptanceWatch
from dflash_plugin.serving.prometheus import (
    collectors,
    count_budget,
    introduce,
    position_counters,
)
from dflash_plugin.sglang.adaptive import AdaptiveVerifier
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.options import DrafterSpec

logger = logging.getLogger("sglang.dflash_plugin")

# What a pass's result says of the rows that it verified of each request, on average.
ROWS = "dflash_plugin_rows"
# Verify passes of requests between two looks at what has been counted.
STRIDE = 64
LABELS = ("model_name",)


class Acceptance:
    """Counts of one scheduler process.

    Args:
        info: the drafter.
        num_drafts: drafts of a block.
        model_name: label of the metrics, or None where SGLang exports none.
    """

    def __init__(self, info: DrafterSpec, num_drafts: int, model_name: str | None) -> None:
        self.info = info
        self.watch = AcceptanceWatch(info)
        # How many passes accepted exactly so many drafts; all, and those not yet looked at.
        self.histogram = [0] * (num_drafts + 1)
        self.recent = [0] * (num_drafts + 1)
        # Of passes that verified a part of a block, by which the drafter is not judged.
        self.cut = [0] * (num_drafts + 1)
        self.unseen = 0
        self.metrics: dict[str, Any] | None = None
        self.labels: list[object] = [model_name]
        self.exported: dict[str, int] = {}
        if model_name is not None:
            self.metrics = {**collectors(LABELS), **position_counters(LABELS)}
            introduce(self.metrics, info, self.labels)

    def observe(self, accepted: Iterable[int], *, whole: bool = True) -> None:
        """Count drafts that requests accepted in one verify pass each, of whole blocks or less."""
        counts = self.recent if whole else self.cut
        for number in accepted:
            counts[number] += 1
            self.unseen += 1
        if self.unseen >= STRIDE:
            self.look()

    def look(self) -> None:
        """Judge and export what came since the last look."""
        passes, judged = self.unseen, sum(self.recent)
        every = [a + b for a, b in zip(self.recent, self.cut, strict=True)]
        by_position, judged_by_position = at_least(every), at_least(self.recent)
        self.histogram = [a + b for a, b in zip(self.histogram, every, strict=True)]
        self.recent, self.cut = [0] * len(self.recent), [0] * len(self.cut)
        self.unseen = 0
        if not passes:
            return
        warning = self.watch.observe(judged, judged_by_position) if judged else None
        if warning is not None and (self.watch.warnings == 1 or self.watch.warnings % 10 == 0):
            logger.warning("%s", warning)
        if self.metrics is None:
            return
        self.metrics["passes"].labels(*self.labels).inc(passes)
        for position, count in enumerate(by_position):
            self.metrics["accepted"].labels(*self.labels, str(position)).inc(count)
        if self.watch.acceptance_length is not None:
            self.metrics["length"].labels(*self.labels).set(self.watch.acceptance_length)
        if warning is not None:
            self.metrics["warnings"].labels(*self.labels).inc()
        if _widths is not None:
            now = _widths.policy.counts()
            count_budget(LABELS, self.labels, growth(now, self.exported))
            self.exported = now

    def summary(self) -> dict[str, Any]:
        """What ``/server_info`` shows."""
        self.look()
        config = self.info.config
        passes, by_position = sum(self.histogram), shares(self.histogram)
        return {
            "version": version("dflash-plugin"),
            "drafter": str(self.info.checkpoint),
            "dialect": config.dialect,
            "block_size": config.block_size,
            "verify_passes": passes,
            "acceptance_length": 1 + sum(by_position) if passes else None,
            "expected_acceptance_length": self.info.expected_acceptance_length,
            "accept_by_position": by_position,
            "acceptance_warnings": self.watch.warnings,
        }


def shares(histogram: Sequence[int]) -> list[float]:
    """Share of passes that accepted the draft at each position."""
    return rates(at_least(histogram), sum(histogram))


_acceptance: Acceptance | None = None
_widths: AdaptiveVerifier | None = None


def listen(widths: AdaptiveVerifier) -> None:
    """Let the choice of this process's widths learn from what is accepted."""
    global _widths
    _widths = widths


def start(info: DrafterSpec, server_args: Any, num_drafts: int) -> None:
    """Begin to count in this process.

    Args:
        info: the drafter.
        server_args: SGLang's ``ServerArgs``.
        num_drafts: drafts of a block.
    """
    global _acceptance
    name = str(argument(server_args, "served_model_name") or argument(server_args, "model_path"))
    exported = bool(argument(server_args, "enable_metrics"))
    _acceptance = Acceptance(info, num_drafts, name if exported else None)


def count_accepted(native: Callable[..., Any], processor: Any, result: Any, batch: Any) -> Any:
    """Where SGLang takes over the tokens that a pass committed."""
    tokens = native(processor, result, batch)
    if _acceptance is None and _widths is None:
        return tokens
    numbers = result.num_correct_drafts_per_req_cpu
    accepted = [
        number
        for request, number in zip(batch.reqs, numbers, strict=True)
        if not (request.finished() or request.is_retracted)
    ]
    block = int(result.speculative_num_draft_tokens)
    rows = int(getattr(result, ROWS, block))
    if _acceptance is not None:
        _acceptance.observe(accepted, whole=rows == block)
    if _widths is not None and not _widths.by_request:
        _widths.policy.observe(rows, accepted)
    return tokens


def describe_acceptance(
    native: Callable[..., Any], manager: Any, meta_info: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Add the share of a request's verify passes that accepted each position to its meta_info."""
    result = native(manager, meta_info, *args, **kwargs)
    histogram = meta_info.get("spec_correct_drafts_histogram")
    passes = meta_info.get("spec_verify_ct")
    if histogram and passes:
        drafts = meta_info["spec_num_proposed_drafts"] // passes
        padded = [*histogram, *[0] * (drafts + 1 - len(histogram))]
        meta_info["spec_accept_by_position"] = shares(padded)
    return result


def describe_internal_state(native: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Add the drafter and its acceptance to ``/server_info``."""
    output = native(scheduler, request)
    if _acceptance is not None:
        output.internal_state["dflash_plugin"] = _acceptance.summary()
        if _widths is not None:
            output.internal_state["dflash_plugin"]["adaptive"] = _widths.policy.summary()
    return output
