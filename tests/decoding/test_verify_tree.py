"""The walk down a draft tree against brute force, and its distribution against the target's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dflash_plugin.decoding.draft_tree import Block, DraftTree, grow_tree
from dflash_plugin.decoding.sampling import block_seeds
from dflash_plugin.decoding.verify import Verdict, verify
from dflash_plugin.decoding.verify_tree import TreeVerdict, verify_tree_sampled, walk
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream, uniforms
from tests.decoding.test_verify import DRAFTS, VOCABULARY, tables

EXTRA, TRIALS = 12, 50_000


def tree_of(log_probs: torch.Tensor, anchors: torch.Tensor, extra: int = EXTRA) -> DraftTree:
    """The tree over marginals [K, V] beside the likeliest chain."""
    chain = log_probs.argmax(-1).expand(len(anchors), -1)
    return beside(chain, log_probs, anchors, extra)


def beside(
    chain: torch.Tensor, log_probs: torch.Tensor, anchors: torch.Tensor, extra: int
) -> DraftTree:
    """The tree over marginals [K, V] beside chains [B, K]."""
    shape = len(anchors), len(log_probs), log_probs.shape[1]
    tokens = torch.arange(shape[-1]).expand(shape)
    return grow_tree(Block(anchors, chain, tokens, log_probs.expand(shape)), extra)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10_000), extra=st.integers(0, 16))
def test_a_walk_follows_the_targets_tokens(seed, extra):
    generator = torch.Generator().manual_seed(seed)
    tree = tree_of(torch.randn(3, 4, generator=generator), torch.tensor([0, 1]), extra)
    following = torch.randint(0, 4, tree.tokens.shape, generator=generator)
    verdict, rows = walk(tree, following, 3)
    for request in range(2):
        at, visited, written = 0, [0], []
        while True:
            wanted = int(following[request, at])
            written.append(wanted)
            children = [
                row
                for row in range(1, tree.tokens.shape[1])
                if tree.parents[request, row] == at and tree.tokens[request, row] == wanted
            ]
            if not children:
                break
            (at,) = children
            visited.append(at)
        padding = [-1] * (4 - len(visited))
        assert rows[request].tolist() == visited + padding
        assert int(verdict.num_accepted[request]) == len(visited) - 1
        assert verdict.tokens[request].tolist() == written + padding
        assert int(verdict.next_token[request]) == written[-1]


def blocks(p, q, last, seeds, position, drawn: bool, extra: int = EXTRA):
    """Trees of blocks behind tokens ``last``, the target's distributions, and the chain's verdict.

    Args:
        p: target, Markov [V, V].
        q: drafter [K, V].
        last: int64 [B], the anchors.
        seeds, position: int64 [B].
        drawn: whether the chain is drawn from q, or the likeliest.
        extra: rows beside the chain.
    """
    chain, draft_probs = q.argmax(-1).expand(len(last), -1), None
    if drawn:
        draft_probs = q.expand(len(last), -1, -1)
        at = position[:, None] + torch.arange(1, DRAFTS + 1)
        chain = sample(draft_probs, uniforms(block_seeds(seeds, position), at, Stream.DRAFT))
    tree = beside(chain, q.log(), last, extra)
    target = p[tree.tokens.clamp(min=0)]
    return tree, target, verify(chain, target[:, : DRAFTS + 1], draft_probs, seeds, position)


def fit(verifier, seed: int = 1, drawn: bool = True) -> float:
    """p of the first two committed tokens after token 0, against what the target alone gives."""
    p, q = tables(seed)
    seeds = torch.arange(TRIALS)
    last = torch.zeros(TRIALS, dtype=torch.int64)
    position = torch.full((TRIALS,), 10)
    first, second = torch.full((2, TRIALS), -1, dtype=torch.int64)
    while bool((second < 0).any()):
        tree, target, chain = blocks(p, q, last, seeds, position, drawn)
        verdict = verifier(tree, chain, target, seeds, position).verdict
        for column in range(DRAFTS + 1):
            token = verdict.tokens[:, column]
            fill_second = (token >= 0) & (first >= 0) & (second < 0)
            fill_first = (token >= 0) & (first < 0)
            second = torch.where(fill_second, token, second)
            first = torch.where(fill_first, token, first)
        last, position = verdict.next_token, position + verdict.num_accepted + 1
    counts = torch.bincount(first * VOCABULARY + second, minlength=VOCABULARY**2)
    expected = (p[0][:, None] * p).flatten().double()
    possible = expected > 0
    if int(counts[~possible].sum()):
        return 0.0
    wanted = expected[possible] / expected.sum() * TRIALS
    return float(chisquare(counts[possible].numpy(), wanted.numpy()).pvalue)


def draws_again(tree, chain, target_probs, seed, positions) -> TreeVerdict:
    """Broken: where no child holds the token that was drawn, draws another one."""
    found = verify_tree_sampled(tree, chain, target_probs, seed, positions)
    last = found.rows.gather(1, found.verdict.num_accepted[:, None])
    u = uniforms(seed, positions[:, None] + 1, Stream.DRAFT)[:, 0]
    again = sample(target_probs.gather(1, last[..., None].expand(-1, -1, VOCABULARY))[:, 0], u)
    children = (tree.parents == last) & (tree.tokens == again[:, None]) & (tree.depths > 0)
    taken = torch.where(children.any(dim=1), again, found.verdict.next_token)
    place = found.verdict.num_accepted[:, None]
    tokens = found.verdict.tokens.scatter(1, place, taken[:, None])
    return TreeVerdict(Verdict(found.verdict.num_accepted, taken, tokens), found.rows)


def takes_any_child_that_the_target_draws(
    tree, chain, target_probs, seed, positions
) -> TreeVerdict:
    """Broken: walks by draws alone where they get further than the chain's verdict."""
    u = uniforms(seed, positions[:, None] + tree.depths + 1, Stream.NEXT)
    free = walk(tree, sample(target_probs, u), DRAFTS)
    bound = verify_tree_sampled(tree, chain, target_probs, seed, positions)
    further = free.verdict.num_accepted > bound.verdict.num_accepted

    def pick(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.where(further.view(-1, *[1] * (one.dim() - 1)), one, other)

    verdict = Verdict(*map(pick, free.verdict, bound.verdict))
    return TreeVerdict(verdict, pick(free.rows, bound.rows))


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("seed", [1, 5])
def test_committed_pairs_follow_the_target(seed, drawn):
    assert fit(verify_tree_sampled, seed, drawn) > 1e-3


@pytest.mark.parametrize("broken", [draws_again, takes_any_child_that_the_target_draws])
def test_a_broken_walk_fails_the_same_test(broken):
    assert fit(broken) < 1e-6


@pytest.mark.parametrize("drawn", [True, False])
def test_a_tree_commits_what_its_chain_commits_and_more(drawn):
    p, q = tables(1)
    last, seeds = torch.zeros(4000, dtype=torch.int64), torch.arange(4000)
    positions = torch.full_like(seeds, 7)
    tree, target, chain = blocks(p, q, last, seeds, positions, drawn)
    verdict, rows = verify_tree_sampled(tree, chain, target, seeds, positions)
    known = chain.tokens >= 0
    assert torch.equal(verdict.tokens[known], chain.tokens[known])
    gained = verdict.num_accepted - chain.num_accepted
    assert int(gained.min()) == 0
    assert float(gained.float().mean()) > 0.2
    index = rows.clamp(min=0)
    assert torch.equal(tree.depths.gather(1, index)[rows >= 0], known_depths(rows))


def known_depths(rows: torch.Tensor) -> torch.Tensor:
    """0, 1, … for the rows of each walk."""
    return torch.arange(rows.shape[1]).expand_as(rows)[rows >= 0]
