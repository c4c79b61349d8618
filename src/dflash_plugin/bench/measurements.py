"""What is seen of requests and of a server's counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from dflash_plugin.bench.schema import KeptPass, Role, Server, Settings
from dflash_plugin.prompts import Message, Prompt


@dataclass
class RequestTrace:
    """One request.

    Attributes:
        prompt_id, turn: which; turns count from 0.
        prompt: the last user turn.
        tokens: output tokens.
        first: seconds from sending to the first token.
        last: seconds from sending to the last token.
        text: the answer.
        chunks: tokens of each streamed chunk, in order.
        token_ids: of the answer; empty where the server does not send them.
        passes: verify passes that the server counted for this request, or None.
        accepted: how many of them accepted exactly 0, 1, … drafts, or None.
    """

    prompt_id: str
    turn: int
    prompt: str
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    text: str = ""
    chunks: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    passes: int | None = None
    accepted: list[int] | None = None

    @property
    def committed(self) -> int:
        """Tokens out of verify passes: all but the first, which the prompt's own pass gives."""
        return max(0, self.tokens - 1)

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time of the tokens after the first chunk; None if there are none."""
        rest = self.tokens - (self.chunks[0] if self.chunks else 1)
        return (self.last - self.first) / rest if rest > 0 else None


OnDone = Callable[[RequestTrace], None]


@dataclass(frozen=True)
class Counters:
    """A server's counters, or their increase; None where it has none.

    Attributes:
        tokens: output tokens.
        passes: verify passes of requests.
        accepted: verify passes that accepted the draft at each position.
        sources: names of the counters behind each of them, or why there are none.
    """

    tokens: int | None
    passes: int | None
    accepted: tuple[int, ...] | None
    sources: dict[str, str]

    def since(self, before: Counters) -> Counters:
        """The increase."""

        def difference(now: int | None, then: int | None) -> int | None:
            return None if now is None or then is None else now - then

        accepted = None
        if self.accepted is not None:
            then = before.accepted or (0,) * len(self.accepted)
            accepted = tuple(a - b for a, b in zip(self.accepted, then, strict=True))
        return Counters(
            difference(self.tokens, before.tokens),
            difference(self.passes, before.passes),
            accepted,
            self.sources,
        )


class KeptPasses(NamedTuple):
    """An answer by its passes; see ``schema.KeptText``."""

    first: list[str]
    passes: list[KeptPass]
    exact: bool
    note: str


class Endpoint(Protocol):
    """What can be measured.

    Attributes:
        by_request: where the passes of a request come from.
        busy_client: whether the client's own computing time is apart from the engine's.
    """

    by_request: str
    busy_client: bool

    def describe(self, role: Role) -> Server:
        """What it is."""

    def counters(self) -> Counters:
        """Its counters now."""

    def run(
        self, prompts: Sequence[Prompt], concurrency: int, settings: Settings, on_done: OnDone
    ) -> tuple[list[RequestTrace], float]:
        """Answer every turn of every prompt.

        Args:
            prompts: started in this order.
            concurrency: requests in flight.
            settings: of the requests.
            on_done: called with each request that is finished, in the order of finishing; what it
                was called with stays when the run is interrupted.

        Returns:
            Observations in the order of prompts and turns, and the seconds of the whole run.
        """

    def fill_passes(self, observations: Sequence[RequestTrace], increase: Counters) -> str | None:
        """Set the requests' ``passes`` of one run; why they are not known, or None."""

    def passes_of(self, observation: RequestTrace) -> KeptPasses | None:
        """The passes that wrote an answer, or None where tokens are not known."""


def turns_of(prompt: Prompt) -> list[list[Message]]:
    """Messages to send at each turn; the answer to a turn goes before the next one."""
    turns: list[list[Message]] = [[]]
    for message in prompt.messages:
        if turns[-1] and turns[-1][-1].role == message.role == "user":
            turns.append([])
        turns[-1].append(message)
    return turns
