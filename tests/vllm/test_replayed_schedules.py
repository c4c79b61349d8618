"""The longest query that a replayed pass is scheduled for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dflash_plugin.vllm import options
from dflash_plugin.vllm.prepared_inputs import promise_two_rows

FULL, PARTS = SimpleNamespace(name="FULL"), SimpleNamespace(name="PIECEWISE")


@pytest.fixture(autouse=True)
def drafts(monkeypatch) -> list[bool]:
    """Whether the plugin drafts, by each time that it is asked."""
    asked = [True]
    monkeypatch.setattr(options, "drafter_spec", lambda _: object() if asked[-1] else None)
    return asked


def promised(
    scheduled: list[int],
    graph: Any = FULL,
    longest: int | None = None,
    separate: bool = True,
    padded: int | None = None,
) -> int | None:
    mode = SimpleNamespace(separate_routine=lambda: separate)
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(
            speculative_config=None, compilation_config=SimpleNamespace(cudagraph_mode=mode)
        )
    )
    batch = SimpleNamespace(
        max_query_len=longest,
        num_scheduled_tokens=np.array(scheduled),
        num_tokens_after_padding=padded or sum(scheduled),
    )
    prepare = promise_two_rows(lambda *arguments: batch)
    assert prepare(runner, "output", "states", SimpleNamespace(cg_mode=graph), 0) is batch
    found: int | None = batch.max_query_len
    return found


def test_a_replayed_pass_without_drafts_is_scheduled_like_its_graph():
    assert promised([1, 1, 1]) == 2
    # One request alone, whose graph was captured for a block.
    assert promised([1]) == 2


def test_longer_queries_stay():
    assert promised([16, 1]) == 16
    # Rows that adaptive verification took from requests count.
    assert promised([1, 1], longest=16) == 16


def test_a_graph_of_one_row_that_was_captured_so_stays():
    assert promised([1], separate=False) is None
    assert promised([1], separate=False, padded=2) == 2


def test_other_passes_are_left_alone(drafts):
    assert promised([1, 1], graph=PARTS) is None
    drafts.append(False)
    assert promised([1, 1]) is None
