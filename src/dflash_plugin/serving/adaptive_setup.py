"""Adaptive verification as the options set it up: what the adapters' verifiers have in common.

The policy chooses the verify length of a step, one number for all requests. ``VerifyBudget`` turns
it into drafts of the batch that fill a captured pass. ``DraftSelection`` shares these out between
the requests on the device, and tells the policy how many tokens they are expected to commit.
Layout, graphs and clock are the adapters' own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from dflash_plugin.adaptive.expected_tokens import ExpectedTokens
from dflash_plugin.adaptive.policy import VerifyLenPolicy, choose_verify_lens
from dflash_plugin.adaptive.step_cost import StepCost, rising
from dflash_plugin.adaptive.step_times import Step
from dflash_plugin.kernels.admit_drafts import admit_drafts, compile_ahead
from dflash_plugin.serving.drafter_spec import Options

# A pass of whole blocks that takes no longer than this many passes of one block mostly waits for
# the target's weights. Shorter passes save less than the choice and the drafts that they leave out
# cost: on an H200 with Qwen3-8B's shape that is so up to 8 requests.
NO_LONGER = 1.3
# Rows of the smallest block that may be drafted by half.
MIN_HALVED = 8


def bypass_of(seconds: Mapping[int, float]) -> int:
    """Requests up to which batches verify whole blocks, because shorter passes gain nothing.

    Args:
        seconds: of a verify pass of whole blocks, by its requests.

    Returns:
        0 where every batch may gain. One request alone says nothing of how time grows with rows.
    """
    if len(seconds) < 2:
        return 0
    seconds = rising(seconds)
    limit = NO_LONGER * seconds[min(seconds)]
    free = [size for size, took in seconds.items() if took <= limit]
    return max(free) if len(free) > 1 else 0


def milliseconds(seconds: Mapping[int, float]) -> str:
    """Times by size for the log: ``16: 4.21, 32: 4.25``."""
    return ", ".join(f"{size}: {1e3 * took:.2f}" for size, took in sorted(seconds.items()))


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
        block=num_drafts + 1,
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

    def add_short_blocks(self, drafts: int) -> None:
        """Expect the tokens of blocks of fewer drafts, too."""
        self._expected_tokens.add_short_blocks(drafts)

    def compile_ahead(self, probabilities: Tensor) -> None:
        """Compile the launch for every size of batch, before the first request.

        Args:
            probabilities: float32 [R, K], the acceptance probabilities it will be called with.
        """
        compile_ahead(self.admit, probabilities)

    def observe(self, probabilities: Callable[[], Tensor]) -> None:
        """Count a step that has drafted; in one of some steps, start to read its probabilities.

        Args:
            probabilities: gives float32 [B, K] or, of shorter blocks, [B, short], acceptance
                probabilities of the batch's drafts.
        """
        if self._expected_tokens.is_due():
            self._expected_tokens.ask(probabilities())

    def expected(
        self, drafts_per_request: Callable[[int], float], drafts: int | None = None
    ) -> list[float]:
        """Tokens that a request commits in a step, on average, at verify length 1, 2, …

        Args:
            drafts_per_request: gives the drafts of a request, on average, at a verify length.
            drafts: drafts of the blocks, at the longest verify length all; those of a whole block
                if None.
        """
        most = self.num_drafts if drafts is None else drafts
        verified = [drafts_per_request(verify_len) for verify_len in range(1, most + 2)]
        return self._expected_tokens.tokens(verified, drafts)


def short_block(block: int) -> int | None:
    """Rows of a shorter block, for steps that verify few drafts of each request.

    Args:
        block: rows of a whole block.

    Returns:
        None where half a block would be too few rows to save anything.
    """
    return block // 2 if block >= MIN_HALVED else None


class VerifyBudget:
    """How many drafts a step verifies.

    Args:
        options: limits of the number of drafts, and the weight of a step's time.
        num_drafts: K, drafts of a block.
        max_requests: requests of a batch, at most.
        device: of the acceptance probabilities.
        agree: gives all processes of a step the same choice; None where there is one process.

    Attributes:
        short: rows of a shorter block, or None where there is none, or where the limits leave no
            verify length that fits it; steps draft such blocks once ``draft_short_blocks`` has been
            called.
        policy: chooses the lengths of a step.
        selection: shares the drafts of a step out between the requests.
        capture_sizes: tokens of the captured verify passes, rising; empty where none is captured.
        requests: of the last step, which the expected tokens are for.

    Raises:
        DFlashError: the limits leave no verify length.
    """

    def __init__(
        self,
        options: Options,
        num_drafts: int,
        max_requests: int,
        device: torch.device,
        *,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self.selection = DraftSelection(options, num_drafts, max_requests, device)
        self.policy = make_policy(options, num_drafts, expected=self.expected, agree=agree)
        short = short_block(num_drafts + 1)
        fits = short is not None and any(1 < rows <= short for rows in self.policy.verify_lens)
        self.short = short if fits else None
        self.capture_sizes: list[int] = []
        self.requests = 1

    def draft_short_blocks(self) -> None:
        """Let the policy choose shorter blocks, too; the engine can draft them.

        Raises:
            ValueError: there is no shorter block.
        """
        if self.short is None:
            raise ValueError("a block of so few rows has no shorter one")
        self.selection.add_short_blocks(self.short - 1)
        self.policy.add_short_blocks(self.short, self._expected_of_short)

    def drafts_to_verify(
        self, verify_len: int, others: int, requests: int, draft_len: int | None = None
    ) -> int:
        """Drafts of a step at a verify length, rounded up to fill a captured pass.

        Args:
            verify_len: rows of a request, anchor included, on average.
            others: tokens of the step that are no drafts.
            requests: those that have drafts.
            draft_len: rows of the blocks that were drafted, anchor included; whole ones if None.
        """
        most = self.policy.verify_lens[-1]
        maximum = requests * (min(most, draft_len or most) - 1)
        wanted = min(requests * (verify_len - 1), maximum)
        if not 0 < wanted < maximum:
            return wanted
        index = bisect_left(self.capture_sizes, others + wanted)
        if index < len(self.capture_sizes):
            wanted = self.capture_sizes[index] - others
        return min(wanted, maximum)

    def expected(self) -> list[float]:
        """Tokens that a request commits in a step, on average, at verify length 1, 2, …"""
        requests = max(1, self.requests)
        return self.selection.expected(
            lambda verify_len: self.drafts_to_verify(verify_len, requests, requests) / requests
        )

    def _expected_of_short(self) -> list[float]:
        """``expected``, of shorter blocks."""
        requests, short = max(1, self.requests), self.short
        assert short is not None
        return self.selection.expected(
            lambda verify_len: (
                self.drafts_to_verify(verify_len, requests, requests, short) / requests
            ),
            short - 1,
        )

    def set_costs(
        self,
        sizes: Sequence[int],
        verifying: Mapping[int, float],
        drafting: Mapping[int, float],
        whole: Mapping[int, float] | None = None,
        drafting_short: Mapping[int, float] | None = None,
    ) -> None:
        """Set the policy's initial step times from profiled passes.

        Args:
            sizes: numbers of requests that steps are captured for.
            verifying: seconds of a verify pass by its tokens.
            drafting: seconds of a draft pass by its requests.
            whole: seconds of a verify pass of whole blocks by its requests, where those have passes
                of their own.
            drafting_short: as ``drafting``, of shorter blocks, where the policy may choose them.
        """
        policy, block = self.policy, self.policy.block
        policy.sizes = tuple(sorted(sizes))
        whole = rising(whole or {})
        costs = {block: StepCost.measured(verifying, drafting)}
        policy.prompts.pass_seconds = costs[block].verify_seconds
        if drafting_short:
            assert self.short is not None
            costs[self.short] = StepCost.measured(verifying, drafting_short)
        for size, (verify_len, draft_len) in product(policy.sizes, policy.choices):
            if draft_len not in costs:
                continue
            cost, drafts = costs[draft_len], size if verify_len > 1 else 0
            tokens = size + self.drafts_to_verify(verify_len, size, size, draft_len)
            seconds = cost.step_seconds(tokens, drafts)
            if tokens == size * policy.verify_lens[-1] and size in whole:
                seconds = whole[size] + cost.draft_seconds(drafts)
            policy.times.prior[Step(size, verify_len, draft_len)] = seconds
