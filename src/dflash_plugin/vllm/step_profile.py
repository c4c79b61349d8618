"""Step times that vLLM profiles at start, of steps that draft whole and shorter blocks."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dflash_plugin.vllm.protocols import StepTimingSample

# Tokens of context of the requests that are profiled, and the variable that changes them. vLLM's
# default, 8192, is for as many requests as a pass has tokens, so that a pass of whole blocks, which
# has far fewer, would seem to take several times as long as it does.
CONTEXT, CONTEXT_VARIABLE = 256, "VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN"
# Steps of one number of requests that draft shorter blocks.
REPEATS = 3


class StepSeconds(NamedTuple):
    """Shortest times of the profiled steps: what disturbs a step makes it longer.

    Attributes:
        verifying: seconds of a verify pass by its tokens.
        drafting: seconds of a draft pass of whole blocks by its requests.
        drafting_short: the same of shorter blocks; empty where none was profiled.
    """

    verifying: dict[int, float]
    drafting: dict[int, float]
    drafting_short: dict[int, float]


class StepProfile:
    """Which steps are profiled, and what their samples say.

    Args:
        block: rows of a whole block.
        max_requests: requests of a batch, at most.
    """

    def __init__(self, block: int, max_requests: int) -> None:
        self.block, self.max_requests = block, max_requests
        # Whether each step drafts shorter blocks.
        self._are_short: list[bool] = []

    def batches(
        self, of_vllm: Iterable[dict[str, int]], most_tokens: int
    ) -> Iterator[tuple[dict[str, int], bool]]:
        """Arguments of each step to run, and whether it drafts shorter blocks.

        Args:
            of_vllm: arguments of the steps that vLLM profiles.
            most_tokens: tokens of the largest step that also runs with shorter blocks; 0 for none.
        """
        self._are_short = []
        changed = {} if CONTEXT_VARIABLE in os.environ else {"context_len": CONTEXT}
        repeats: Counter[int] = Counter()
        for given in of_vllm:
            batch = {**given, **{key: value for key, value in changed.items() if key in given}}
            self._are_short.append(False)
            yield batch, False
            requests = min(batch["num_tokens"], self.max_requests)
            if batch["num_tokens"] <= most_tokens and repeats[requests] < REPEATS:
                repeats[requests] += 1
                self._are_short.append(True)
                yield batch, True
        if most_tokens >= self.block:
            # Steps that serve schedule whole blocks, for which vLLM compiles a kernel of its own.
            self._are_short.append(True)
            yield {"num_tokens": self.block, "uniform_decode": True}, True

    def seconds(self, samples: Sequence[StepTimingSample]) -> StepSeconds:
        """What the steps took.

        Args:
            samples: of the steps in their order, times in milliseconds. Where one is missing, all
                count as steps that drafted whole blocks.
        """
        are_short = self._are_short
        if len(are_short) != len(samples):
            are_short = [False] * len(samples)
        verify: dict[int, list[float]] = defaultdict(list)
        whole: dict[int, list[float]] = defaultdict(list)
        short: dict[int, list[float]] = defaultdict(list)
        for sample, is_short in zip(samples, are_short, strict=True):
            verify[sample.num_target_tokens].append(sample.forward_ms)
            if sample.full_cudagraph:  # Other steps draft eagerly.
                (short if is_short else whole)[sample.num_reqs].append(sample.drafter_ms)
        return StepSeconds(_shortest(verify), _shortest(whole), _shortest(short))


def _shortest(table: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {size: min(times) / 1e3 for size, times in table.items()}
