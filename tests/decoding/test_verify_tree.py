"""The walk down a draft tree against brute force, and its distribution against the target's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dflash_plugin.decoding.draft_tree import Block, DraftTree, grow_tree
from dflash_plugin.decoding.verify import Verdict
from dflash_plugin.decoding.verify_tree import (
    TreeVerdict,
    verify_tree_greedy,
    verify_tree_sampled,
    walk,
)
from dflash_plugin.kernels.reference import sample
from dflash_plugin.kernels.uniforms import Stream, uniforms
from tests.decoding.test_verify import DRAFTS, VOCABULARY, tables

EXTRA, TRIALS = 6, 50_000


def tree_of(log_probs: torch.Tensor, anchors: torch.Tensor, extra: int = EXTRA) -> DraftTree:
    """The tree over marginals [K, V]."""
    batch = len(anchors)
    tokens = torch.arange(log_probs.shape[1]).expand(batch, len(log_probs), -1)
    chain = log_probs.argmax(-1).expand(batch, -1)
    return grow_tree(Block(anchors, tokens, chain, log_probs.expand(batch, -1, -1)), extra)


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


def test_a_greedy_walk_takes_the_likeliest_tokens():
    tree = tree_of(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0]))
    logits = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(1))
    found, expected = verify_tree_greedy(tree, logits, 3), walk(tree, logits.argmax(-1), 3)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.verdict.tokens, expected.verdict.tokens)


def fit(verifier, seed: int = 0) -> float:
    """p of the first two committed tokens after token 0, against what the target alone gives."""
    p, q = tables(seed)
    seeds = torch.arange(TRIALS)
    last = torch.zeros(TRIALS, dtype=torch.int64)
    position = torch.full((TRIALS,), 10)
    first, second = torch.full((2, TRIALS), -1, dtype=torch.int64)
    while bool((second < 0).any()):
        tree = tree_of(q.log(), last)
        target = p[tree.tokens]
        verdict = verifier(tree, target, seeds, position, DRAFTS).verdict
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


def draws_again(tree, target_probs, seed, positions, num_drafts) -> TreeVerdict:
    """Broken: where no child holds the token that was drawn, draws another one."""
    at = positions[:, None] + tree.depths + 1
    once = sample(target_probs, uniforms(seed, at, Stream.NEXT))
    again = sample(target_probs, uniforms(seed, at, Stream.ACCEPT))
    is_child = tree.parents[:, None] == torch.arange(tree.tokens.shape[1])[:, None]
    is_child[:, :, 0] = False
    held = (is_child & (tree.tokens[:, None] == once[..., None])).any(dim=-1)
    return walk(tree, torch.where(held, once, again), num_drafts)


def goes_on_with_the_best_child(tree, target_probs, seed, positions, num_drafts) -> TreeVerdict:
    """Broken: follows the chain where no child of the anchor holds its token."""
    found = verify_tree_sampled(tree, target_probs, seed, positions, num_drafts)
    stuck = (found.verdict.num_accepted == 0)[:, None]
    tokens = torch.where(stuck & (found.rows == 0), tree.tokens[:, 1:2], found.verdict.tokens)
    next_token = torch.where(stuck[:, 0], tree.tokens[:, 1], found.verdict.next_token)
    return TreeVerdict(Verdict(found.verdict.num_accepted, next_token, tokens), found.rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_committed_pairs_follow_the_target(seed):
    assert fit(verify_tree_sampled, seed) > 1e-3


@pytest.mark.parametrize("broken", [draws_again, goes_on_with_the_best_child])
def test_a_broken_walk_fails_the_same_test(broken):
    assert fit(broken) < 1e-6


def test_a_seed_writes_the_targets_text_whatever_the_tree():
    """Draws are keyed by position, so no tree changes them."""
    p, q = tables(2)
    seeds, start = torch.arange(50), torch.full((50,), 7)
    texts = []
    for extra in (0, 3, 12):
        last, position = torch.zeros(50, dtype=torch.int64), start
        written: list[list[int]] = [[] for _ in range(50)]
        for _ in range(12):
            tree = tree_of(q.log(), last, extra)
            verdict = verify_tree_sampled(tree, p[tree.tokens], seeds, position, DRAFTS).verdict
            for text, tokens in zip(written, verdict.tokens.tolist(), strict=True):
                text += [token for token in tokens if token >= 0]
            last, position = verdict.next_token, position + verdict.num_accepted + 1
        texts.append([text[:12] for text in written])
    assert texts[0] == texts[1] == texts[2]
