"""Watches the acceptance length while an engine serves."""

from __future__ import annotations

from collections.abc import Sequence

from dflash_plugin.serving.drafter_spec import DrafterSpec


class AcceptanceWatch:
    """Compares the acceptance length of each window of verify passes with the expected one.

    Args:
        spec: the drafter, with its expected acceptance length and options.

    Attributes:
        acceptance_length: τ of the last whole window; None before the first one.
        warnings: windows that were far below the expected acceptance length.
    """

    def __init__(self, spec: DrafterSpec) -> None:
        self.expected = spec.expected_acceptance_length
        self.share = spec.options.acceptance_warning
        self.window = spec.options.acceptance_window
        self.passes = 0
        self.accepted: list[int] = []
        self.acceptance_length: float | None = None
        self.warnings = 0

    def observe(self, passes: int, accepted_by_position: Sequence[int]) -> str | None:
        """Add verify passes.

        Args:
            passes: number of verify passes, one per request and step.
            accepted_by_position: [num_draft_tokens], how many of these passes accepted the draft
                at each position.

        Returns:
            A warning where these passes complete a window that is far below the expected
            acceptance length, else None.
        """
        self.passes += passes
        old = self.accepted or [0] * len(accepted_by_position)
        self.accepted = [a + b for a, b in zip(old, accepted_by_position, strict=True)]
        if self.passes < self.window:
            return None
        rates = [count / self.passes for count in self.accepted]
        self.acceptance_length = 1 + sum(rates)
        self.passes, self.accepted = 0, []
        if self.expected is None or sum(rates) >= self.share * (self.expected - 1):
            return None
        self.warnings += 1
        return (
            f"acceptance length is {self.acceptance_length:.2f} over the last {self.window} "
            f"verify passes, the drafter's own record is {self.expected:.2f}: "
            f"{probable_cause(rates)}"
        )


def probable_cause(rates: Sequence[float]) -> str:
    """The probable cause of low acceptance.

    Args:
        rates: share of verify passes that accepted the draft at each position.
    """
    if rates[0] < 0.1:
        return (
            "hardly any first draft is accepted, so the drafter probably belongs to another "
            "target, or to another revision or quantization of it; `dflash-plugin inspect "
            "DRAFTER --target TARGET --replay` compares the two"
        )
    if len(rates) > 1 and rates[1] < 0.3 * rates[0]:
        return (
            "the first draft is accepted but what follows is not, so rotation, window, mask token "
            "or block size probably differ from training; `dflash-plugin inspect` lists them"
        )
    return (
        "all positions are low, so the traffic is probably unlike the training text (chat "
        "template, thinking mode, language, high temperature); train the drafter on such text"
    )
