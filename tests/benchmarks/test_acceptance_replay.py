"""Recorded acceptance in engines with made-up weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dflash_plugin import kernels
from dflash_plugin.adaptive.simulation.traces import Traces

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from acceptance_replay.acceptance_replay import (  # noqa: E402
    Replay,
    longer,
    put,
    request_of,
    walk,
    walk_naive,
    weights,
)

CPU = torch.device("cpu")
RECORDED = BENCHMARKS / "results" / "traces-smollm2-250.safetensors"


def test_short_blocks_are_put_behind_each_other():
    right = torch.tensor([2, 2, 1, 0, 2, 0])
    sure = torch.arange(12.0).view(6, 2)
    found = longer(Traces(sure, right, torch.tensor([0, 4, 6])), 5)
    # At 0: both of 0, both missing of 2 but one: three stand. At 2: one stands, so no more count.
    assert found.right.tolist() == [3, 2, 1, 0, 2, 0]
    assert found.confidence[0].tolist() == [0, 1, 4, 5, -8]
    # Behind the end of a text nothing is sure and nothing stands.
    assert found.confidence[4].tolist() == [8, 9, -8, -8, -8]


@pytest.mark.parametrize("tau", [3.45, 5.0, 6.4])
def test_a_replay_commits_what_was_asked_for(tau):
    replay = Replay(RECORDED, 15, [tau], CPU)
    slots, passes = torch.arange(200), 400
    stood = sum(int(replay.commit(slots, torch.full((200,), 15)).sum()) for _ in range(passes))
    assert 1 + stood / (200 * passes) == pytest.approx(tau, rel=0.03)


def test_requests_keep_the_acceptance_length_of_their_prompts(monkeypatch):
    monkeypatch.setenv("REPLAY_TAU", "6.4,3.45")
    replay = Replay(RECORDED, 15, [6.4, 3.45], CPU)
    slots, passes = torch.arange(400), 400
    requests = [request_of([place % 2, place]) for place in range(400)]
    replay.begin(slots, torch.tensor(requests))
    full = torch.full((400,), 15)
    stood = torch.stack([replay.commit(slots, full) for _ in range(passes)]).float().mean(dim=0)
    assert 1 + float(stood[::2].mean()) == pytest.approx(6.4, rel=0.03)
    assert 1 + float(stood[1::2].mean()) == pytest.approx(3.45, rel=0.03)


def test_fewer_verified_drafts_commit_fewer():
    replay = Replay(RECORDED, 15, [5.0], CPU)
    slots = torch.arange(100)
    verified = torch.arange(100) % 8
    for _ in range(50):
        place = replay.at.place[slots].clone()
        stood = replay.commit(slots, verified)
        assert torch.equal(stood, torch.minimum(replay.texts.right[place], verified))


def test_a_request_begins_where_its_first_drafts_are_verified():
    """However an engine divides a prompt; later it also steps where nothing is verified."""
    replay = Replay(RECORDED, 15, [5.0], CPU)
    slots, none, all_drafts = torch.arange(9), torch.zeros(9).long(), torch.full((9,), 15)
    replay.begin(slots, torch.arange(9) + 40)
    begins = replay.at.place[slots].clone()
    for _ in range(3):
        assert not replay.commit(slots, none).any()
        assert torch.equal(replay.at.place[slots], begins)
    first = replay.commit(slots, all_drafts)
    assert torch.equal(replay.at.place[slots], begins + first + 1)
    place = replay.at.place[slots].clone()
    replay.commit(slots, none)
    assert torch.equal(replay.at.place[slots], place + 1)


def test_drafts_of_shorter_blocks_stand_in_their_rows():
    out, places = torch.zeros(3, 4), torch.tensor([0, 1, 0, 1])
    put(torch.tensor([0.1, 0.2, 0.3, 0.4]), places, out)
    assert torch.equal(out[:, :2], torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.0, 0.0]]))
    assert not out[:, 2:].any()


def test_confidences_are_those_of_the_place():
    replay = Replay(RECORDED, 15, [5.0], CPU)
    slots = torch.tensor([3, 3, 9, -1])
    places = torch.tensor([0, 14, 2, 5])
    found = replay.confidences(slots, places)
    assert found.tolist() == replay.confidence[replay.at.place[slots], places].tolist()
    # A confidence tells of the outcome it was recorded with.
    sure, right = replay.confidence[:, 0], replay.texts.right > 0
    assert sure[right].mean() > sure[~right].mean() + 1


def test_texts_that_do_not_reach_it_are_named():
    traces = longer(Traces.load(RECORDED), 7)
    with pytest.raises(ValueError, match=r"REPLAY_TAU is 20\.0"):
        weights(traces, 20.0)


def test_the_launch_and_its_twin_walk_alike():
    """With padding, whose slot is -1, and verified numbers that end many texts."""
    generator = torch.Generator().manual_seed(0)
    launched, naive = (Replay(RECORDED, 15, [5.0, 3.45], CPU) for _ in range(2))
    requests = torch.randint(0, 2 << 16, (200,), generator=generator)
    for replay in (launched, naive):
        replay.begin(torch.arange(200), requests)
    for _ in range(60):
        count = int(torch.randint(1, 201, (1,), generator=generator))
        slots = torch.randperm(200, generator=generator)[:count]
        verified = torch.randint(0, 16, (count,), generator=generator)
        slots[-1] = -1
        with kernels.forced(True):
            stood = walk(slots, verified, launched.texts, launched.at)
        assert torch.equal(stood, walk_naive(slots, verified, naive.texts, naive.at))
        for ours, theirs in zip(launched.at, naive.at, strict=True):
            assert torch.equal(ours[:-1], theirs[:-1])
    assert not torch.equal(naive.at.text[:200], requests)
