"""What SGLang's passes teach about drafts, and what later passes draft by it."""

import pytest
import torch

from dflash_plugin.decoding.draft_sampling import ENOUGH, LEARN_EVERY
from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors
from dflash_plugin.kernels.accept import Accepted, Sampled
from dflash_plugin.sglang.draft_estimate import REQUESTS, DraftEstimate, Lesson

CPU = torch.device("cpu")
SURE = torch.tensor([1.0, 0.0, 0.0, 0.0])
SPREAD = torch.tensor([0.4, 0.2, 0.2, 0.2])


def sampling_of(batch: int) -> SamplingTensors:
    return SamplingTensors.build([SamplingParams(1.0)] * batch, CPU)


def taught(
    judged: Sampled, own: torch.Tensor, accepted: int, seeded: bool = False
) -> DraftEstimate:
    """An estimate of two drafts that has seen the pass of one request often enough."""
    estimate = DraftEstimate(2, CPU)
    lesson = Lesson(torch.tensor([0]), own)
    verdict = Accepted(torch.tensor([accepted], dtype=torch.int32), torch.tensor([0]))
    for _ in range(int(ENOUGH)):
        estimate.learn(lesson, judged, verdict, sampling_of(1), torch.tensor([seeded]))
    return estimate


def factors(estimate: DraftEstimate) -> list[float]:
    return estimate.factors(sampling_of(1), torch.tensor([False]))[0].tolist()


ROWS = torch.stack([SPREAD, SURE, SURE])
OWN = torch.stack([SPREAD, SPREAD])[None]
SEED = torch.tensor([0])
WHOLE = Sampled(ROWS[None], OWN, SEED)
# The rows of another request lie before and behind.
CUT = Sampled(torch.cat([SURE[None], ROWS, SPREAD[None]]), OWN, SEED, torch.tensor([[1, 2, 3]]))
TOKENS = torch.tensor([[[3, 0, 1], [0, 2, 1]]])
OF_CANDIDATES = WHOLE._replace(
    draft_probs=torch.tensor([[[0.2, 0.4, 0.2], [0.4, 0.2, 0.2]]]), candidates=TOKENS
)


@pytest.mark.parametrize("judged", [WHOLE, CUT, OF_CANDIDATES], ids=["whole", "cut", "candidates"])
def test_a_draft_of_which_the_target_is_sure_is_the_likeliest_token(judged):
    """By the rows of the pass's own request; where p and q are alike, draws stay."""
    assert factors(taught(judged, judged.draft_probs, accepted=1)) == [1.0, 0.0]


def test_nothing_is_learnt_behind_the_first_rejected_draft():
    assert factors(taught(WHOLE, OWN, accepted=0)) == [1.0, 1.0]


def test_a_request_with_a_seed_teaches_nothing():
    assert float(taught(WHOLE, OWN, accepted=1, seeded=True).acceptance.rows.sum()) == 0


def test_one_of_some_passes_is_learnt_from_by_turns():
    estimate, batch = DraftEstimate(2, CPU), REQUESTS + 2
    found = [estimate.learnt_from(batch) for _ in range(3 * LEARN_EVERY)]
    kept = [requests.tolist() for requests in found if requests is not None]
    assert [place for place, requests in enumerate(found) if requests is not None] == [
        0,
        LEARN_EVERY,
        2 * LEARN_EVERY,
    ]
    assert kept[:2] == [list(range(REQUESTS)), list(range(REQUESTS, batch))]
    assert all(0 < len(requests) <= REQUESTS for requests in kept)
