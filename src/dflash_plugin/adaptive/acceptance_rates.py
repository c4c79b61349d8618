"""How often drafts are accepted, by their position in a block, from the outcomes of passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# Passes of requests whose outcomes count; older ones fade.
MEMORY = 20000.0
# How many outcomes a position's prior weighs; the prior is the rate of the position before it.
PRIOR = 8.0
# The prior of the first position.
FIRST = 0.7


class AcceptanceRates:
    """For each draft position, how often its draft is accepted if those before it are.

    Args:
        drafts: positions of a block, K.
    """

    def __init__(self, drafts: int) -> None:
        self.judged = [0.0] * drafts
        self.accepted = [0.0] * drafts

    def observe(self, verified: int, accepted: Iterable[int]) -> None:
        """Learn from a pass.

        Args:
            verified: drafts of each request that were verified.
            accepted: drafts that were accepted, by request.
        """
        counts = Counter(accepted)
        left = counts.total()
        keep = max(0.0, 1.0 - left / MEMORY)
        for position in range(verified):
            # The first rejected draft was judged, the drafts after it were not.
            self.judged[position] = keep * self.judged[position] + left
            left -= counts[position]
            self.accepted[position] = keep * self.accepted[position] + left

    def expected(self) -> list[float]:
        """Tokens that a request commits in a pass of 1, 2, … rows, [K + 1]."""
        rate, survival, tokens, found = FIRST, 1.0, 1.0, [1.0]
        for judged, accepted in zip(self.judged, self.accepted, strict=True):
            rate = (accepted + PRIOR * rate) / (judged + PRIOR)
            survival *= rate
            tokens += survival
            found.append(tokens)
        return found
