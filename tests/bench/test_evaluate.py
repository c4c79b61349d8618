"""Medians and ranges of timed runs, with the clock replaced."""

from __future__ import annotations

from typing import Any

import pytest

from dflash_plugin.bench import evaluate
from dflash_plugin.bench.evaluate import (
    acceptance_by_position,
    compare_runs,
    evaluate_set,
    pooled_tau,
)
from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt
from dflash_plugin.transformers.engine import Request, Result


class Scripted:
    """An engine whose runs take times by plan."""

    num_drafts = 3

    def __init__(self, name: str, seconds: list[float], order: list[str]) -> None:
        self.name, self.seconds, self.order = name, iter(seconds), order
        self.result = Result(tokens=list(range(9)), committed=[4, 4], accepted=[3, 3])

    def generate(self, requests: list[Request], on_tokens: Any = None) -> list[Result]:
        return [self.result for _ in requests]


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    def timed(engine, requests, on_tokens=None):
        engine.order.append(engine.name)
        return engine.generate(requests), next(engine.seconds)

    monkeypatch.setattr(evaluate, "generate_timed", timed)
    monkeypatch.setattr(evaluate, "encode", lambda *_: [1, 2])


def test_engines_take_turns_after_a_run_that_is_not_timed():
    order: list[str] = []
    ours = Scripted("ours", [9.0, 1.0, 3.0, 2.0], order)
    alone = Scripted("alone", [9.0, 4.0, 6.0, 8.0], order)
    found = evaluate_set("set", [Prompt.user("a")], None, ours, alone, repeats=3)
    assert order == ["ours", "alone"] * 4
    assert found.tokens_per_second == 9 / 2
    assert found.tokens_per_second_range == (9 / 3, 9 / 1)
    assert found.plain_tokens_per_second == 9 / 6
    assert found.plain_tokens_per_second_range == (9 / 8, 9 / 4)
    assert found.speedup == pytest.approx(3)
    assert (found.repeats, found.equal, found.tau) == (3, 1, 4.0)


def test_one_run_is_timed_as_it_is():
    order: list[str] = []
    found = evaluate_set("set", [Prompt.user("a")], None, Scripted("ours", [2.0], order))
    assert order == ["ours"]
    assert found.tokens_per_second_range == (4.5, 4.5)
    assert found.speedup is None


def test_a_comparison_tells_the_range_of_its_speedups():
    order: list[str] = []
    ours = Scripted("ours", [1.0, 2.0, 1.0], order)
    alone = Scripted("alone", [3.0, 4.0, 5.0], order)
    found = compare_runs(ours, alone, Request([1], 9), repeats=3)
    assert found.speedup_range == [2.0, 5.0]
    assert found.facts()["speedup"] == pytest.approx(4.0)
    assert found.equal


def test_no_run_is_refused():
    with pytest.raises(DFlashError, match="repeats is 0"):
        evaluate_set("set", [Prompt.user("a")], None, Scripted("ours", [], []), repeats=0)


def test_acceptance_of_results():
    results = [Result(committed=[4, 1], accepted=[3, 0]), Result(committed=[2], accepted=[1])]
    assert pooled_tau(results) == pytest.approx(7 / 3)
    assert acceptance_by_position(results, 3) == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert pooled_tau([]) == 0.0
    assert acceptance_by_position([], 2) == [0.0, 0.0]
