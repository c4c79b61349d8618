"""Prometheus collectors named ``dflash:…``, made once in a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from dflash_plugin.serving.drafter_spec import DrafterSpec

# Labels of ``dflash:worker_info``, which doctor reads.
WORKER_FACTS = ("attention_backend", "draft_attention_backend", "draft_graphs")


@cache
def collectors(labels: tuple[str, ...]) -> dict[str, Any]:
    """Collectors of every engine. Cached, because the registry refuses a second one of a name.

    Args:
        labels: names of the engine's own labels.
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
def cache_gauges(labels: tuple[str, ...]) -> dict[str, Any]:
    """Gauges of what a drafter takes of the KV cache.

    Args:
        labels: names of the engine's own labels.
    """
    from prometheus_client import Gauge

    told = {
        "kv_cache_groups": "Groups of layers with a block table of their own.",
        "kv_cache_tokens_lost": "Tokens that the cache would hold more without the drafter.",
    }
    return {
        name: Gauge(f"dflash:{name}", text, labels, multiprocess_mode="mostrecent")
        for name, text in told.items()
    }


@cache
def engine_info(labels: tuple[str, ...], facts: tuple[str, ...]) -> Any:
    """The gauge whose labels tell how an engine runs the drafter.

    Args:
        labels: names of the engine's own labels.
        facts: names of the labels that tell it.
    """
    from prometheus_client import Gauge

    text = "How the engine runs the drafter."
    return Gauge("dflash:engine_info", text, [*labels, *facts], multiprocess_mode="mostrecent")


@cache
def worker_info(labels: tuple[str, ...]) -> Any:
    """The gauge whose labels, ``WORKER_FACTS``, tell what a worker chose for both models.

    Args:
        labels: names of the engine's own labels.
    """
    from prometheus_client import Gauge

    text = "Attention back ends in use, and whether drafts replay a CUDA graph."
    names = [*labels, *WORKER_FACTS]
    return Gauge("dflash:worker_info", text, names, multiprocess_mode="mostrecent")


@cache
def position_counters(labels: tuple[str, ...]) -> dict[str, Any]:
    """Counters of verify passes, for an engine that has none by position.

    Args:
        labels: names of the engine's own labels.
    """
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
    """Counters of how many drafts an adaptive policy lets an engine verify.

    Args:
        labels: names of the engine's own labels.
    """
    from prometheus_client import Counter

    return {
        "steps": Counter(
            "dflash:adaptive_steps", "Decode steps by rows of a block that they verified.",
            [*labels, "rows"],
        ),
        "probed": Counter(
            "dflash:probe_steps", "Decode steps that tried another verify length.", labels
        ),
        "shortened": Counter(
            "dflash:short_block_steps", "Decode steps that drafted a shorter block.", labels
        ),
        "waited": Counter(
            "dflash:prompt_wait_steps", "Decode steps for which prompts waited for others.", labels
        ),
        "proposed": Counter("dflash:proposed_drafts", "Drafts that were made.", labels),
        "verified": Counter("dflash:verified_drafts", "Drafts that were verified.", labels),
        "saved": Counter("dflash:saved_drafts", "Drafts that were left unverified.", labels),
    }  # fmt: skip


def count_budget(
    labels: tuple[str, ...], values: Sequence[object], increases: Mapping[str, int]
) -> None:
    """Add what an adaptive policy has chosen.

    Args:
        labels: names of the engine's own labels.
        values: values of these labels.
        increases: increase of each count, by "steps:ROWS", "probed", "shortened", "waited",
            "proposed", "verified" and "saved".
    """
    counters = budget_counters(labels)
    for name, count in increases.items():
        kind, *rows = name.split(":")
        counters[kind].labels(*values, *rows).inc(count)


def introduce(made: dict[str, Any], spec: DrafterSpec, values: list[object]) -> None:
    """Set the metrics that do not change while an engine serves.

    Args:
        made: made by ``collectors``.
        spec: the drafter.
        values: values of the engine's labels.
    """
    config = spec.config
    made["info"].labels(
        *values, version("dflash-plugin"), config.dialect, str(config.block_size)
    ).set(1)
    if spec.expected_acceptance_length is not None:
        made["expected"].labels(*values).set(spec.expected_acceptance_length)
    made["warnings"].labels(*values).inc(0)
