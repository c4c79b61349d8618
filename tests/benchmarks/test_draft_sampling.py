"""τ of proposals on known texts: the same as over all drafts."""

from itertools import product

import pytest
import torch

from benchmarks.draft_sampling import Replay, expected_passes, reached
from dflash_plugin.decoding.draft_sampling import FACTORS, sharpen
from dflash_plugin.kernels.block_verification import block_acceptance
from tests.kernels.test_block_verification import DRAFTS, VOCABULARY, tables, target_rows

BLOCKS = list(product(range(VOCABULARY), repeat=DRAFTS))


@pytest.mark.parametrize("factor", FACTORS)
def test_what_texts_tell_is_what_drafts_reach(factor):
    """The mean over the target's texts is that over the drafter's drafts, by enumeration."""
    p, q = (part.float() for part in tables(0))
    tokens = torch.tensor(BLOCKS)
    rows = torch.cat([target_rows(p, block) for block in BLOCKS])
    wanted = rows[:, :-1].gather(-1, tokens[..., None])[..., 0]
    factors = torch.full((DRAFTS,), factor)
    block = Replay(rows[:, :-1], q.expand(len(BLOCKS), -1, -1), wanted, tokens)
    by_texts = {
        how: (wanted.prod(1)[:, None] * reach).sum(0)
        for how, reach in reached(block, factors).items()
    }
    proposal = sharpen(q, factors)
    drawn = proposal.expand(len(BLOCKS), -1, -1).gather(-1, tokens[..., None])[..., 0].double()
    possible = drawn.prod(1) > 0
    joint = block_acceptance(
        tokens[possible], rows[possible], proposal.expand(int(possible.sum()), -1, -1)
    ).joint
    shares = drawn[possible].prod(1)[:, None]
    single = (wanted[possible] / drawn[possible]).clamp(max=1).cumprod(1)
    torch.testing.assert_close(by_texts["block"], (shares * joint[:, 1:]).sum(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        by_texts["token by token"], (shares * single).sum(0), atol=1e-6, rtol=0
    )


def test_passes_of_a_text():
    """Half of the passes at the first position accept one draft of four positions."""
    reach = torch.tensor([[0.5, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    # From 0 to 1 or 2; from 1 to 2; from 2 over 3 to the end.
    assert expected_passes(reach) == pytest.approx(1 + 0.5 + 1)
