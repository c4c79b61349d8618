"""The selector's walk: drawn paths follow the distribution that comes back with them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dflash_plugin.drafter.selector import Proposal
from dflash_plugin.kernels.select_path import Path, select_path_naive

VOCABULARY, DRAFTS, CANDIDATES, RANK, TRIALS = 11, 3, 4, 3, 100_000
TEMPERATURE, ANCHOR = 0.7, 2


class Block(NamedTuple):
    """What one block is walked by."""

    candidates: Tensor
    logits: Tensor
    gates: Tensor
    predecessors: Tensor
    successors: Tensor

    @classmethod
    def random(cls, seed: int) -> Block:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        ids = [torch.randperm(VOCABULARY, generator=generator)[:CANDIDATES] for _ in range(DRAFTS)]
        return cls(
            torch.stack(ids),
            normal(DRAFTS, CANDIDATES),
            normal(DRAFTS, RANK),
            normal(VOCABULARY, RANK),
            normal(VOCABULARY, RANK),
        )

    def scores(self, place: int, before: int) -> Tensor:
        """Of the candidates [C] after token ``before``, float64, an edge at a time."""
        edges = [
            sum(
                float(
                    self.predecessors[before, r] * self.gates[place, r] * self.successors[token, r]
                )
                for r in range(RANK)
            )
            for token in self.candidates[place].tolist()
        ]
        return self.logits[place].double() + torch.tensor(edges, dtype=torch.float64)

    def path_probability(self, path: tuple[int, ...]) -> float:
        """That a path of candidates' numbers is drawn."""
        probability, before = 1.0, ANCHOR
        for place, index in enumerate(path):
            shares = torch.softmax(self.scores(place, before) / TEMPERATURE, -1)
            probability *= float(shares[index])
            before = int(self.candidates[place, index])
        return probability


def draw(block: Block, temperature: Tensor, u: Tensor) -> Path:
    batch = len(u)
    return select_path_naive(
        block.candidates.expand(batch, -1, -1),
        block.logits.expand(batch, -1, -1),
        block.gates.expand(batch, -1, -1),
        torch.full((batch,), ANCHOR),
        block.predecessors,
        block.successors,
        temperature,
        u,
    )


def draw_with_one_noise(block: Block, temperature: Tensor, u: Tensor) -> Path:
    """Broken: the noise of the first position everywhere."""
    return draw(block, temperature, u[:, :1].expand_as(u))


def draw_at_temperature_1(block: Block, temperature: Tensor, u: Tensor) -> Path:
    """Broken: forgets the temperature."""
    return draw(block, torch.ones_like(temperature), u)


def draw_without_a_path(block: Block, temperature: Tensor, u: Tensor) -> Path:
    """Broken: every position is drawn as if the anchor were before it."""
    parts = []
    for place in range(DRAFTS):
        here = slice(place, place + 1)
        alone = block._replace(
            candidates=block.candidates[here], logits=block.logits[here], gates=block.gates[here]
        )
        parts.append(draw(alone, temperature, u[:, here]).tokens)
    return Proposal(torch.cat(parts, dim=1), block.logits)


Draw = Callable[[Block, Tensor, Tensor], Path | Proposal]


def p_value(drawing: Draw, seed: int) -> float:
    """Of the paths that a walk draws, against exact probabilities."""
    block = Block.random(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    u = torch.rand(TRIALS, DRAFTS, generator=generator, dtype=torch.float64)
    tokens = drawing(block, torch.full((TRIALS,), TEMPERATURE), u).tokens
    index = (tokens[..., None] == block.candidates).long().argmax(-1)
    powers = torch.tensor([CANDIDATES**place for place in reversed(range(DRAFTS))])
    counts = torch.bincount((index * powers).sum(-1), minlength=CANDIDATES**DRAFTS).double()
    paths = product(range(CANDIDATES), repeat=DRAFTS)
    expected = torch.tensor([block.path_probability(path) for path in paths]) * TRIALS
    likely = expected >= 5
    observed = [*counts[likely].tolist(), float(counts[~likely].sum())]
    wanted = [*expected[likely].tolist(), float(expected[~likely].sum())]
    scale = TRIALS / sum(wanted)
    return float(chisquare(observed, [number * scale for number in wanted]).pvalue)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_drawn_paths_follow_their_distribution(seed):
    assert p_value(draw, seed) > 1e-3


@pytest.mark.parametrize(
    "broken", [draw_with_one_noise, draw_at_temperature_1, draw_without_a_path]
)
def test_a_broken_walk_fails_the_same_test(broken):
    assert p_value(broken, 0) < 1e-6


def test_what_comes_back_is_what_the_path_was_drawn_from():
    block = Block.random(3)
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(500, DRAFTS, generator=generator, dtype=torch.float64)
    temperature = torch.where(torch.arange(500) % 2 == 0, TEMPERATURE, 0.0)
    found = draw(block, temperature, u)
    assert found.probs is not None
    for row in range(500):
        before = ANCHOR
        for place in range(DRAFTS):
            scores = block.scores(place, before)
            token = int(found.tokens[row, place])
            index = block.candidates[place].tolist().index(token)
            probs = torch.softmax(scores / TEMPERATURE, -1)
            if row % 2:  # Greedy beside those that draw.
                assert index == int(scores.argmax())
                probs = torch.nn.functional.one_hot(scores.argmax(), CANDIDATES).double()
            torch.testing.assert_close(found.scores[row, place].double(), scores, atol=1e-5, rtol=0)
            torch.testing.assert_close(found.probs[row, place].double(), probs, atol=1e-5, rtol=0)
            # At temperature 1, whichever was drawn.
            odds = torch.logit(torch.softmax(scores, -1).max())
            torch.testing.assert_close(
                found.confidence[row, place].double(), odds, atol=1e-4, rtol=0
            )
            before = token
    assert len({tuple(tokens) for tokens in found.tokens[::2].tolist()}) > 10
    assert len({tuple(tokens) for tokens in found.tokens[1::2].tolist()}) == 1


def test_without_noise_the_best_are_taken_everywhere():
    block = Block.random(4)
    u = torch.zeros(1, DRAFTS)
    greedy = draw(block, torch.zeros(1), u)
    batch = [part[None] for part in block[:3]]
    found = select_path_naive(*batch, torch.tensor([ANCHOR]), block.predecessors, block.successors)
    assert found.probs is None
    assert torch.equal(found.tokens, greedy.tokens)
    assert torch.equal(found.scores, greedy.scores)
