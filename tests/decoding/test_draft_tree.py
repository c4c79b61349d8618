"""Draft trees against enumeration of all prefixes."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_plugin.decoding.draft_tree import (
    LEAST_LOG_PROB,
    MOST_LOG_PROB,
    Block,
    DraftTree,
    grow_tree,
)

CANDIDATES = 4
ANCHORS = torch.tensor([90, 91])


def grown(table: torch.Tensor, extra: int, marginals: bool = False) -> DraftTree:
    """The tree where probabilities depend on the position and the token before.

    Args:
        table: log-probabilities [drafts, token before, token]; tokens are 0 to ``CANDIDATES`` - 1.
        extra: rows beside the chain.
        marginals: the token before makes no difference.
    """
    drafts, before, chain, log_probs = len(table), ANCHORS % CANDIDATES, [], []
    for position in table:
        log_probs.append(position[before])
        before = log_probs[-1].argmax(-1)
        chain.append(before)
    candidates = torch.arange(CANDIDATES).expand(2, drafts, -1)
    block = Block(ANCHORS, torch.stack(chain, 1), candidates, torch.stack(log_probs, 1))
    return grow_tree(
        block, extra, None if marginals else lambda position, places: table[position][places]
    )


def table_of(seed: int, drafts: int, sharpness: float) -> torch.Tensor:
    """Log-probabilities [drafts, token before, token]."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(drafts, CANDIDATES, CANDIDATES, generator=generator)
    return torch.log_softmax(logits, dim=-1)


def paths(tree: DraftTree, request: int) -> list[tuple[int, ...]]:
    """Tokens from the anchor to each row, the anchor left out."""
    found = []
    for row in range(tree.tokens.shape[1]):
        path = []
        while row:
            path.append(int(tree.tokens[request, row]))
            row = int(tree.parents[request, row])
        found.append(tuple(reversed(path)))
    return found


def enumerated(table: torch.Tensor, anchor: int) -> tuple[list[tuple[int, ...]], dict]:
    """The chain's prefixes, and the weight of every other prefix."""
    drafts = len(table)
    weights = {}
    for length in range(1, drafts + 1):
        for path in product(range(CANDIDATES), repeat=length):
            before = (anchor % CANDIDATES, *path[:-1])
            steps = [table[d, b, t] for d, (b, t) in enumerate(zip(before, path, strict=True))]
            weights[path] = float(sum(s.clamp(LEAST_LOG_PROB, MOST_LOG_PROB) for s in steps))
    chain: list[tuple[int, ...]] = [()]
    for depth in range(drafts):
        before = chain[-1][-1] if depth else anchor % CANDIDATES
        chain.append((*chain[-1], int(table[depth, before].argmax())))
    others = {path: weight for path, weight in weights.items() if path not in chain}
    return chain, others


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    drafts=st.integers(1, 4),
    extra=st.integers(0, 20),
    sharpness=st.sampled_from([0.1, 1.0, 4.0, 30.0]),
    marginals=st.booleans(),
)
def test_the_tree_is_the_chain_and_the_best_other_prefixes(
    seed, drafts, extra, sharpness, marginals
):
    table = table_of(seed, drafts, sharpness)
    if marginals:
        table = table[:, :1].expand(-1, CANDIDATES, -1)
    tree = grown(table, extra, marginals)
    assert tree.tokens.shape == (2, 1 + drafts + extra)
    for request, anchor in enumerate(ANCHORS.tolist()):
        chain, others = enumerated(table, anchor)
        found = paths(tree, request)
        assert found[: drafts + 1] == chain
        count = min(extra, len(others))
        chosen = found[drafts + 1 : drafts + 1 + count]
        assert len(set(chosen)) == count
        best = sorted(others.values(), reverse=True)[:count]
        torch.testing.assert_close(
            torch.tensor([others[path] for path in chosen]), torch.tensor(best), atol=1e-4, rtol=0
        )
        assert tree.depths[request, : drafts + 1 + count].tolist() == [
            len(path) for path in found[: drafts + 1 + count]
        ]
        assert tree.tokens[request, drafts + 1 + count :].tolist() == [-1] * (extra - count)
        assert all(tree.parents[request, row] < row for row in range(1, 1 + drafts + extra))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), drafts=st.integers(1, 5), extra=st.integers(0, 24))
def test_the_mask_shows_what_leads_to_a_row(seed, drafts, extra):
    tree = grown(table_of(seed, drafts, 1.0), extra)
    rows = tree.tokens.shape[1]
    for request in range(2):
        expected = torch.zeros(rows, rows, dtype=torch.bool)
        for row in range(rows):
            at = row
            expected[row, at] = True
            while at:
                at = int(tree.parents[request, at])
                expected[row, at] = True
        assert torch.equal(tree.mask[request], expected)


def test_certain_drafts_do_not_lose_their_parents():
    """Children of probability one weigh as much as their parents."""
    log_probs = torch.tensor([[0.0, -1.0], [0.0, float("-inf")], [0.0, float("-inf")]])[None]
    tokens = torch.tensor([[[5, 6], [7, 8], [9, 4]]])
    tree = grow_tree(Block(torch.tensor([1]), tokens[..., 0], tokens, log_probs), 3)
    assert paths(tree, 0)[4:] == [(6,), (6, 7), (6, 7, 9)]


def test_the_likeliest_token_stands_beside_a_drawn_one():
    """The chain's own tokens count as likely as the likeliest; 9 is no candidate at all."""
    tokens = torch.tensor([[[5, 6, 7]] * 2])
    log_probs = torch.tensor([[[0.6, 0.3, 0.1]] * 2]).log()
    drawn = torch.tensor([[7, 9]])
    tree = grow_tree(Block(torch.tensor([1]), drawn, tokens, log_probs), 5)
    assert paths(tree, 0)[:3] == [(), (7,), (7, 9)]
    # 0.6, then both of 0.6 * 0.6, then 0.3, then one of 0.6 * 0.3.
    assert paths(tree, 0)[3] == (5,)
    assert set(paths(tree, 0)[4:6]) == {(5, 5), (7, 5)}
    assert paths(tree, 0)[6] == (6,)
    assert paths(tree, 0)[7] in {(5, 6), (6, 5), (7, 6)}


@pytest.mark.parametrize("rows", [4, 6, 9])
def test_the_first_rows_are_the_tree_of_fewer(rows):
    table = table_of(3, 3, 1.0)
    whole = grown(table, 8).first(rows)
    for ours, theirs in zip(whole, grown(table, rows - 4), strict=True):
        assert torch.equal(ours, theirs)
