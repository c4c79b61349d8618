"""Acceptance per request and position, in ``meta_info``, ``/server_info`` and Prometheus.

SGLang's scheduler counts the accepted drafts of each request; the hooks of this module count them
in the same place, on the worker whose pass it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    worker_info,
)
from dflash_plugin.sglang.adaptive import AdaptiveVerifier
from dflash_plugin.sglang.compat import argument
from dflash_plugin.sglang.options import DrafterSpec

logger = logging.getLogger("sglang.dflash_plugin")

# Attribute of a pass's result: rows that the pass verified, on average of the requests.
ROWS = "dflash_plugin_rows"
# Verify passes of single requests between two exports.
STRIDE = 64
LABELS = ("model_name",)


class AcceptanceCounts:
    """Acceptance counts of one scheduler process.

    Args:
        info: the drafter.
        num_drafts: drafts of a block.
        model_name: label of the metrics, or None where SGLang exports none.
        verifier: whose policy's counts are exported too, or None.
        pool_bytes: GPU memory of the drafter's keys and values.
        verify_state_bytes: GPU memory of a recurrent target's state for verify passes.
        facts: how the worker runs both models, by ``WORKER_FACTS``.
    """

    def __init__(
        self,
        info: DrafterSpec,
        num_drafts: int,
        model_name: str | None,
        verifier: AdaptiveVerifier | None = None,
        pool_bytes: int = 0,
        verify_state_bytes: int = 0,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self.info, self.verifier, self.pool_bytes = info, verifier, pool_bytes
        self.verify_state_bytes = verify_state_bytes
        self.facts = facts or {}
        self.watch = AcceptanceWatch(info)
        # Index n counts the passes that accepted exactly n drafts: all of them, and those of whole
        # blocks and of less that are not exported yet. Passes of less do not judge the drafter.
        self.histogram = [0] * (num_drafts + 1)
        self.whole_blocks = [0] * (num_drafts + 1)
        self.partial_blocks = [0] * (num_drafts + 1)
        self.unexported = 0
        self.metrics: dict[str, Any] | None = None
        self.labels: list[object] = [model_name]
        self.exported: dict[str, int] = {}
        if model_name is not None:
            self.metrics = {**collectors(LABELS), **position_counters(LABELS)}
            introduce(self.metrics, info, self.labels)
            if self.facts:
                worker_info(LABELS).labels(*self.labels, *self.facts.values()).set(1)

    def observe(self, accepted: Iterable[int], *, whole: bool = True) -> None:
        """Count one verify pass.

        Args:
            accepted: accepted drafts of each request.
            whole: the pass verified whole blocks.
        """
        counts = self.whole_blocks if whole else self.partial_blocks
        for number in accepted:
            counts[number] += 1
            self.unexported += 1
        if self.unexported >= STRIDE:
            self.export()

    def export(self) -> None:
        """Judge the drafter by the passes since the last export, and export them."""
        passes, judged = self.unexported, sum(self.whole_blocks)
        every = [a + b for a, b in zip(self.whole_blocks, self.partial_blocks, strict=True)]
        by_position, judged_by_position = at_least(every), at_least(self.whole_blocks)
        self.histogram = [a + b for a, b in zip(self.histogram, every, strict=True)]
        self.whole_blocks = [0] * len(every)
        self.partial_blocks = [0] * len(every)
        self.unexported = 0
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
        if self.verifier is not None:
            now = self.verifier.policy.counts()
            count_budget(LABELS, self.labels, growth(now, self.exported))
            self.exported = now

    def summary(self) -> dict[str, Any]:
        """The entry in ``/server_info``."""
        self.export()
        config = self.info.config
        passes, by_position = sum(self.histogram), shares(self.histogram)
        found: dict[str, Any] = {
            "version": version("dflash-plugin"),
            "drafter": str(self.info.checkpoint),
            "dialect": config.dialect,
            "block_size": config.block_size,
            "verify_passes": passes,
            "acceptance_length": 1 + sum(by_position) if passes else None,
            "expected_acceptance_length": self.info.expected_acceptance_length,
            "accept_by_position": by_position,
            "acceptance_warnings": self.watch.warnings,
            "draft_pool_bytes": self.pool_bytes,
            "verify_state_bytes": self.verify_state_bytes,
            **self.facts,
        }
        if self.verifier is not None:
            found["adaptive"] = self.verifier.policy.summary()
        return found


class Counted:
    """The part of our worker that the scheduler's hooks look for.

    Attributes:
        info: the drafter.
        acceptance: counts of this process, or None where another rank counts or the server is not
            warm yet.
        verifier: chooses which rows are verified, or None where every pass verifies whole blocks.
        pool_bytes: GPU memory of the drafter's keys and values.
        verify_state_bytes: GPU memory of a recurrent target's state for verify passes.
    """

    info: DrafterSpec
    acceptance: AcceptanceCounts | None = None
    verifier: AdaptiveVerifier | None = None
    pool_bytes: int = 0
    verify_state_bytes: int = 0

    @property
    def facts(self) -> dict[str, str]:
        """Attention back ends in use, and whether drafts replay a CUDA graph."""
        return {}

    @property
    def num_drafts(self) -> int:
        """Drafts of a block, the anchor not counted, whether they are verified or not."""
        raise NotImplementedError

    def count(self, accepted: Sequence[int], rows: int, block: int) -> None:
        """Count a verify pass, and let the policy learn from it.

        Args:
            accepted: accepted drafts of each request.
            rows: rows that the pass verified, on average of the requests.
            block: rows of a whole block.
        """
        if self.acceptance is not None:
            self.acceptance.observe(accepted, whole=rows == block)
        if self.verifier is not None and not self.verifier.by_request:
            self.verifier.policy.observe(rows, accepted)


def shares(histogram: Sequence[int]) -> list[float]:
    """Share of passes that accepted the draft at each position."""
    return rates(at_least(histogram), sum(histogram))


def start(worker: Counted, server_args: Any) -> None:
    """Begin to count the passes of a worker.

    Args:
        worker: holds the counts from then on.
        server_args: SGLang's ``ServerArgs``.
    """
    name = str(argument(server_args, "served_model_name") or argument(server_args, "model_path"))
    exported = bool(argument(server_args, "enable_metrics"))
    worker.acceptance = AcceptanceCounts(
        worker.info,
        worker.num_drafts,
        name if exported else None,
        worker.verifier,
        worker.pool_bytes,
        worker.verify_state_bytes,
        worker.facts,
    )


def count_accepted(native: Callable[..., Any], processor: Any, result: Any, batch: Any) -> Any:
    """Hook where SGLang takes over the tokens that a pass committed."""
    tokens = native(processor, result, batch)
    worker = processor.draft_worker
    if isinstance(worker, Counted):
        numbers = result.num_correct_drafts_per_req_cpu
        accepted = [
            number
            for request, number in zip(batch.reqs, numbers, strict=True)
            if not (request.finished() or request.is_retracted)
        ]
        block = int(result.speculative_num_draft_tokens)
        worker.count(accepted, int(vars(result).get(ROWS, block)), block)
    return tokens


def describe_acceptance(
    native: Callable[..., Any], manager: Any, meta_info: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Add the share of a request's verify passes that accepted each draft to its meta_info."""
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
    worker = scheduler.draft_worker
    if isinstance(worker, Counted) and worker.acceptance is not None:
        output.internal_state["dflash_plugin"] = worker.acceptance.summary()
    return output
