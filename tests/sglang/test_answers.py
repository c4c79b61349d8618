"""Several answers to a request with a seed draw with seeds of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dflash_plugin.sglang import answers


@pytest.fixture
def sent(monkeypatch) -> list[Any]:
    monkeypatch.setattr(answers, "drafter_spec", lambda path: path)
    monkeypatch.setattr(answers, "draft_model_path", lambda server_args: server_args)
    return []


def send(sent: list[Any], params: Any, drafter: str | None = "drafter") -> int | None:
    """Send a copy of a request; the seed that it has then."""
    request = SimpleNamespace(sampling_params=params)
    manager = SimpleNamespace(server_args=drafter)
    answers.spread_seeds(lambda _, one: sent.append(one), manager, request)
    assert sent[-1] is request
    return request.sampling_params.sampling_seed


def params(seed: int | None = 7, n: int = 3, max_new_tokens: int = 8) -> Any:
    return SimpleNamespace(sampling_seed=seed, n=n, max_new_tokens=max_new_tokens)


def test_each_answer_has_its_seed_and_the_next_request_the_same(sent):
    first, second = ([send(sent, one) for _ in range(3)] for one in (params(), params()))
    assert first == second
    assert first[0] == 7
    assert len(set(first)) == 3
    assert all(0 <= seed < 1 << 62 for seed in first)


def test_answers_of_two_requests_are_counted_apart(sent):
    one, two = params(), params(seed=8)
    seeds = [send(sent, each) for each in (one, two, one, two, one, two)]
    alone = params()
    assert seeds[::2] == [send(sent, alone) for _ in range(3)]
    assert len(set(seeds)) == 6


def test_what_fills_the_cache_is_not_counted(sent):
    assert send(sent, params(max_new_tokens=0)) == 7
    assert answers._sent == {}


@pytest.mark.parametrize("given", [params(seed=None), params(n=1)])
def test_other_requests_are_left_alone(sent, given):
    assert [send(sent, given) for _ in range(2)] == [given.sampling_seed] * 2


def test_other_servers_are_left_alone(sent):
    given = params()
    assert [send(sent, given, drafter=None) for _ in range(3)] == [7] * 3
