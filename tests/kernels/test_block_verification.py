"""Block verification: exact by enumeration, and never worse than draft by draft."""

from itertools import pairwise, product

import pytest
import torch

from dflash_plugin.kernels.block_verification import block_acceptance, residual, verify_block

VOCABULARY, DRAFTS = 3, 3
TEXTS = list(product(range(VOCABULARY), repeat=DRAFTS + 1))


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Markov target p[last, next] and drafter q[position, next], one entry of each zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(2 * VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
    weights[0, 1] = weights[VOCABULARY, 2] = 0
    p, q = (weights**1.5).split(VOCABULARY)
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def target_rows(p: torch.Tensor, drafts: tuple[int, ...]) -> torch.Tensor:
    """[1, K + 1, V] behind token 0 and behind each draft."""
    return p[torch.tensor([[0, *drafts]])]


def chance(p: torch.Tensor, text: tuple[int, ...]) -> float:
    """Of the tokens behind the first, drawn from the target."""
    probability = 1.0
    for last, token in pairwise(text):
        probability *= float(p[last, token])
    return probability


def committed(p, q, said, verified=DRAFTS) -> tuple[dict[tuple[int, ...], float], float]:
    """Exact probabilities of the next K + 1 tokens, and the expected number of accepted drafts.

    Args:
        p: the target's.
        q: what blocks are drawn from.
        said: what verification is told that they were drawn from.
        verified: how many drafts of a block count, or a function of the drafts that says it.
    """
    found = dict.fromkeys(TEXTS, 0.0)
    expected = 0.0
    for drafts in product(range(VOCABULARY), repeat=DRAFTS):
        drawn = float(torch.stack([q[i, token] for i, token in enumerate(drafts)]).prod())
        if drawn == 0:
            continue
        rows = target_rows(p, drafts)
        count = verified(drafts) if callable(verified) else verified
        verdict = block_acceptance(torch.tensor([drafts]), rows, said[None], torch.tensor([count]))
        # From the back: the last draft with a yes is where the block is cut.
        yes = [1.0, *verdict.decisions[0].tolist()]
        remaining = drawn
        for cut in range(DRAFTS, -1, -1):
            share, remaining = remaining * yes[cut], remaining * (1 - yes[cut])
            expected += share * cut
            following = rows[0, cut]
            if cut < count:
                left = residual(following, said[cut], verdict.joint[0, cut])
                following = left if float(left.sum()) > 0 else following
            following = following / following.sum()
            for text in TEXTS:
                if text[:cut] == drafts[:cut]:
                    then = float(following[text[cut]]) * chance(p, text[cut:])
                    found[text] += share * then
    return found, expected


def accepted_one_by_one(p: torch.Tensor, q: torch.Tensor) -> float:
    """Drafts that rejection sampling accepts on average."""
    expected = 0.0
    for drafts in product(range(VOCABULARY), repeat=DRAFTS):
        drawn = q[torch.arange(DRAFTS), torch.tensor(drafts)]
        wanted = p[torch.tensor([0, *drafts[:-1]]), torch.tensor(drafts)]
        if bool((drawn > 0).all()):
            expected += float(drawn.prod() * (wanted / drawn).clamp(max=1).cumprod(0).sum())
    return expected


@pytest.mark.parametrize("count", [0, 2, DRAFTS])
@pytest.mark.parametrize("seed", range(4))
def test_texts_have_the_targets_probabilities(seed, count):
    p, q = tables(seed)
    found, _ = committed(p, q, q, count)
    for text, probability in found.items():
        assert probability == pytest.approx(chance(p, (0, *text)), abs=1e-12)


def while_zero(drafts: tuple[int, ...]) -> int:
    """Verify up to the first draft that is not token 0: no draft decides about itself."""
    return next((i + 1 for i, token in enumerate(drafts) if token), DRAFTS)


def only_zeros(drafts: tuple[int, ...]) -> int:
    """Verify the drafts before the first one that is not token 0."""
    return next((i for i, token in enumerate(drafts) if token), DRAFTS)


@pytest.mark.parametrize("seed", range(4))
def test_whether_a_draft_is_verified_may_depend_on_those_before_it_alone(seed):
    p, q = tables(seed)
    for verified, exact in ((while_zero, True), (only_zeros, False)):
        found, _ = committed(p, q, q, verified)
        error = max(abs(found[text] - chance(p, (0, *text))) for text in TEXTS)
        assert error < 1e-12 if exact else error > 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_a_wrong_proposal_distribution_gives_other_texts(seed):
    p, q = tables(seed)
    found, _ = committed(p, q, (q + 1) / (VOCABULARY + 1))
    assert max(abs(found[text] - chance(p, (0, *text))) for text in TEXTS) > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_more_drafts_are_accepted_than_one_by_one(seed):
    p, q = tables(seed)
    assert committed(p, q, q)[1] > accepted_one_by_one(p, q) + 1e-4


def test_a_drafter_that_is_the_target_has_every_draft_accepted():
    p, _ = tables(0)
    drafts = torch.tensor([[0, 2, 1]])
    rows = target_rows(p, (0, 2, 1))
    high = torch.full((1, 4), 0.999999)
    accepted = verify_block(drafts, rows, rows[:, :-1], high[:, :3], high)
    assert int(accepted.num_accepted) == 3


def test_a_block_ends_at_an_invalid_draft():
    p, q = tables(1)
    low = torch.zeros(1, 4)
    accepted = verify_block(
        torch.tensor([[0, -1, 0]]), target_rows(p, (0, 0, 0)), q[None], low[:, :3], low
    )
    assert int(accepted.num_accepted) <= 1
