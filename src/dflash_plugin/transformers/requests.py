"""Requests and results of the Transformers engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dflash_plugin.decoding.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: upper limit of the output.
        stop_ids: tokens that end the output, themselves included; None takes the target's.
        sampling: how the target samples; greedy by default.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    stop_ids: Sequence[int] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass
class Result:
    """The output of one request.

    Attributes:
        tokens: output token ids, a stop token included.
        finish_reason: "stop" or "length".
        committed: tokens committed by each verify pass, the bonus token included; the first output
            token comes from the prompt's own pass and is not among them.
        accepted: drafts that verification accepted in each pass, before stop and length limits.
        drafted: drafts that each pass verified, if the engine records them; of a tree those of its
            chain.
        accepted_rows: of passes over trees, the rows that were accepted, in order: 1 to K are the
            chain's, higher ones stand beside it.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    committed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)
    accepted_rows: list[list[int]] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """τ: tokens committed per verify pass; 0 when there was none."""
        return sum(self.committed) / len(self.committed) if self.committed else 0.0
