"""A server's metrics, completed by what SGLang says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dflash_plugin.monitor.client import MetricsSnapshot, plugin_states


def summary(info: Mapping[str, Any]) -> dict[str, Any]:
    """The plugin's part of SGLang's ``/server_info``; empty without it."""
    return next(iter(plugin_states(info)), {})


def completed(reading: MetricsSnapshot, info: Mapping[str, Any]) -> MetricsSnapshot:
    """With SGLang's own counts, which need no metrics and are not a step behind.

    Args:
        reading: its metrics; empty where it exports none.
        info: ``/server_info``.
    """
    states = info.get("internal_states") or [{}]
    native = states[0].get("avg_spec_accept_length")
    ours = summary(info)
    if not ours:
        return replace(reading, length=native) if native and not reading.length else reading
    passes = ours.get("verify_passes", 0)
    rates = ours.get("accept_by_position", [])
    adaptive = ours.get("adaptive", {})
    return replace(
        reading,
        passes=passes,
        accepted={position: rate * passes for position, rate in enumerate(rates)},
        expected=ours.get("expected_acceptance_length"),
        verified=adaptive.get("drafts_verified", reading.verified),
        saved=adaptive.get("drafts_saved", reading.saved),
    )
