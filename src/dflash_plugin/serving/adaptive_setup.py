"""Adaptive verification as the options set it up: what the adapters' verifiers have in common.

The policy chooses the verify length of a step, one number for all requests. ``DraftSelection``
selects the drafts of each request on the device, and tells the policy how many tokens they are
expected to commit. Layout, graphs and clock are the adapters' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dflash_plugin.adaptive.expected_tokens import ExpectedTokens
from dflash_plugin.adaptive.policy import VerifyLenPolicy, choose_verify_lens
from dflash_plugin.kernels.admit_drafts import admit_drafts, compile_ahead
from dflash_plugin.serving.drafter_spec import Options


def make_policy(
    options: Options,
    num_drafts: int,
    *,
    expected: Callable[[], Sequence[float]] | None = None,
    agree: Callable[[int], int] | None = None,
) -> VerifyLenPolicy:
    """The policy that chooses verify lengths within the options' limits.

    Args:
        options: limits of the number of drafts, and the weight of a step's time.
        num_drafts: K, drafts of a block.
        expected: tokens that a request commits at verify length 1, 2, …, K + 1; None lets the
            policy learn them from outcomes.
        agree: gives all processes of a step the same choice; None where there is one process.

    Raises:
        DFlashError: the limits leave no verify length.
    """
    verify_lens = choose_verify_lens(
        num_drafts + 1, options.min_draft_tokens, options.max_draft_tokens
    )
    return VerifyLenPolicy(
        verify_lens,
        latency_vs_throughput=options.latency_vs_throughput,
        expected=expected,
        agree=agree,
    )


class DraftSelection:
    """Selects the drafts that a step verifies, and expects how many tokens they commit.

    Args:
        options: limits of the number of drafts.
        num_drafts: K, drafts of a block.
        max_requests: requests of a batch, at most.
        device: of the acceptance probabilities.

    Attributes:
        admit: ``admit_drafts`` within the options' limits; one launch.
    """

    def __init__(
        self, options: Options, num_drafts: int, max_requests: int, device: torch.device
    ) -> None:
        self.num_drafts = num_drafts
        self.admit = partial(
            admit_drafts,
            min_drafts=options.min_draft_tokens,
            max_drafts=options.max_draft_tokens,
        )
        self._expected_tokens = ExpectedTokens(num_drafts, max_requests, device)

    def compile_ahead(self, probabilities: Tensor) -> None:
        """Compile the launch for every size of batch, before the first request.

        Args:
            probabilities: float32 [R, K], the acceptance probabilities it will be called with.
        """
        compile_ahead(self.admit, probabilities)

    def observe(self, probabilities: Callable[[], Tensor]) -> None:
        """Count a step that has drafted; in one of some steps, start to read its probabilities.

        Args:
            probabilities: gives float32 [B, K], acceptance probabilities of the batch's drafts.
        """
        if self._expected_tokens.is_due():
            self._expected_tokens.ask(probabilities())

    def expected(self, drafts_per_request: Callable[[int], float]) -> list[float]:
        """Tokens that a request commits in a step, on average, at verify length 1, 2, …, K + 1.

        Args:
            drafts_per_request: gives the drafts of a request, on average, at a verify length.
        """
        return [
            self._expected_tokens.tokens(drafts_per_request(verify_len))
            for verify_len in range(1, self.num_drafts + 2)
        ]
