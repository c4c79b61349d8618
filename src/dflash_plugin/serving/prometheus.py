"""Prometheus collectors under ``dflash:``, made once in a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from dflash_plugin.serving.drafter_spec import DrafterSpec


@cache
def collectors(labels: tuple[str, ...]) -> dict[str, Any]:
    """Ours; the registry refuses a second of the same name.

    Args:
        labels: the engine's own label names.
    """
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


@cache
def position_counters(labels: tuple[str, ...]) -> dict[str, Any]:
    """Counters of verify passes, for an engine that has none of its own by position."""
    from prometheus_client import Counter

    return {
        "passes": Counter("dflash:verify_passes", "Verify passes of requests.", labels),
        "accepted": Counter(
            "dflash:accepted_drafts",
            "Verify passes that accepted the draft at this position.",
            [*labels, "position"],
        ),
    }


@cache
def budget_counters(labels: tuple[str, ...]) -> dict[str, Any]:
    """Counters of how many drafts an adaptive policy lets an engine verify."""
    from prometheus_client import Counter

    return {
        "steps": Counter(
            "dflash:adaptive_steps", "Decode steps by rows of a block that they verified.",
            [*labels, "rows"],
        ),
        "proposed": Counter("dflash:proposed_drafts", "Drafts that were made.", labels),
        "verified": Counter("dflash:verified_drafts", "Drafts that were verified.", labels),
        "saved": Counter("dflash:saved_drafts", "Drafts that were left unverified.", labels),
    }  # fmt: skip


def count_budget(
    labels: tuple[str, ...], values: Sequence[object], grown: Mapping[str, int]
) -> None:
    """Add what an adaptive policy has chosen.

    Args:
        labels: the engine's own label names.
        values: of them.
        grown: ``budget.width.growth``.
    """
    counters = budget_counters(labels)
    for name, count in grown.items():
        kind, *rows = name.split(":")
        counters[kind].labels(*values, *rows).inc(count)


def introduce(made: dict[str, Any], info: DrafterSpec, values: list[object]) -> None:
    """Set what does not change while an engine serves.

    Args:
        made: ``collectors``.
        info: the drafter.
        values: of the engine's labels.
    """
    config = info.config
    made["info"].labels(
        *values, version("dflash-plugin"), config.dialect, str(config.block_size)
    ).set(1)
    if info.expected_acceptance_length is not None:
        made["expected"].labels(*values).set(info.expected_acceptance_length)
    made["warnings"].labels(*values).inc(0)
