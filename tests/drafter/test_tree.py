"""A drafter's trees: its own chain, and probabilities at the requests' temperatures."""

import pytest
import torch

from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors
from dflash_plugin.drafter.tree import propose_tree
from tests.helpers.tiny import DFLASH2, tiny_drafter, tiny_target

REDUCED = {"draft_vocab_size": 24, "own_head": True}
ANCHORS, POSITIONS = torch.tensor([5, 9]), torch.tensor([10, 20])


def hidden_of(drafter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, drafter.config.num_draft_tokens, 32, generator=generator)


def log_prob(drafter, hidden, request, path, temperature) -> float:
    """Of a prefix, token by token."""
    logits, total = drafter.logits(hidden)[request], 0.0
    for depth, token in enumerate(path):
        rows = logits[depth]
        names = drafter.token_ids(torch.arange(len(rows)))
        if drafter.candidate_selector is not None:
            names = rows.topk(drafter.candidate_selector.top_k).indices
            before = torch.tensor(path[depth - 1] if depth else int(ANCHORS[request]))
            rows = drafter.candidate_selector.scores(
                names, rows[names], hidden[request, depth], before
            )
        total += float(torch.log_softmax(rows / temperature, -1)[names == token])
    return total


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, DFLASH2, REDUCED], ids=["dflash", "dflash2", "reduced"])
def test_the_tree_holds_the_chain_and_no_worse_prefix_than_it_leaves_out(changes):
    drafter = tiny_drafter(tiny_target(), **changes)
    hidden = hidden_of(drafter)
    count = drafter.config.num_draft_tokens
    proposal = drafter.propose(hidden, ANCHORS, POSITIONS)
    chain, temperatures = proposal.tokens, torch.tensor([0.0, 0.5])
    tree = propose_tree(drafter, proposal, hidden, ANCHORS, 12, temperatures)
    assert torch.equal(tree.tokens[:, 0], ANCHORS)
    assert torch.equal(tree.tokens[:, 1 : count + 1], chain)
    for request, temperature in enumerate((1.0, 0.5)):
        found = {}
        for row in range(count + 1, count + 13):
            path, at = [], row
            while at:
                path.append(int(tree.tokens[request, at]))
                at = int(tree.parents[request, at])
            path.reverse()
            found[tuple(path)] = log_prob(drafter, hidden, request, path, temperature)
        weights = list(found.values())
        assert weights == pytest.approx(sorted(weights, reverse=True), abs=1e-3)
        # Other first tokens, and others after each of them.
        names = drafter.token_ids(drafter.logits(hidden)[request].topk(5, -1).indices).tolist()
        for path in [(a,) for a in names[0]] + [(a, b) for a in names[0] for b in names[1]]:
            if path not in found and list(path) != chain[request, : len(path)].tolist():
                weight = log_prob(drafter, hidden, request, list(path), temperature)
                assert weight < min(weights) + 1e-3


@torch.no_grad()
def test_a_tree_without_temperatures_is_that_of_greedy_requests():
    drafter = tiny_drafter(tiny_target())
    greedy = SamplingTensors.build([SamplingParams()] * 2, torch.device("cpu")).temperature
    hidden = hidden_of(drafter)
    proposal = drafter.propose(hidden, ANCHORS, POSITIONS)
    pairs = zip(
        propose_tree(drafter, proposal, hidden, ANCHORS, 8),
        propose_tree(drafter, proposal, hidden, ANCHORS, 8, greedy),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, DFLASH2, REDUCED], ids=["dflash", "dflash2", "reduced"])
def test_drawn_drafts_are_the_chain_and_no_sibling(changes):
    drafter = tiny_drafter(tiny_target(), **changes)
    hidden = hidden_of(drafter)
    params = [SamplingParams(temperature=4.0, seed=seed) for seed in (1, 2)]
    sampling = SamplingTensors.build(params, torch.device("cpu"))
    proposal = drafter.propose(hidden, ANCHORS, POSITIONS, sampling)
    likeliest = drafter.propose(hidden, ANCHORS, POSITIONS).tokens
    assert not torch.equal(proposal.tokens, likeliest)
    tree = propose_tree(drafter, proposal, hidden, ANCHORS, 12, sampling.temperature)
    count = drafter.config.num_draft_tokens
    assert torch.equal(tree.tokens[:, 1 : count + 1], proposal.tokens)
    for request in range(2):
        pairs = torch.stack([tree.parents[request, 1:], tree.tokens[request, 1:]], dim=1)
        assert len(pairs.unique(dim=0)) == count + 12
