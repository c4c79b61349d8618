"""What the servers of all engines share: requests in flight and timed streams."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from dflash_plugin.bench.measurements import (
    Counters,
    KeptPasses,
    OnDone,
    RequestTrace,
    turns_of,
)
from dflash_plugin.bench.schema import KeptPass, Role, Server, Settings
from dflash_plugin.monitor.client import ServerClient
from dflash_plugin.monitor.metrics import ServerError
from dflash_plugin.prompts import Message, Prompt


class HttpEndpoint(ABC):
    """A server.

    Args:
        client: sends requests to it.
    """

    by_request: str
    busy_client = True

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.model = ""

    @abstractmethod
    def describe(self, role: Role) -> Server:
        """What it is."""

    @abstractmethod
    def counters(self) -> Counters:
        """Its counters now."""

    @abstractmethod
    def fill_passes(self, observations: Sequence[RequestTrace], increase: Counters) -> str | None:
        """Set the requests' ``passes`` of one run; why they are not known, or None."""

    @abstractmethod
    async def prepare(
        self, client: httpx.AsyncClient, messages: list[Message], settings: Settings
    ) -> tuple[str, dict[str, Any]]:
        """Path and body of a request; not timed."""

    @abstractmethod
    def read(self, observation: RequestTrace, chunk: dict[str, Any]) -> int:
        """Take a streamed chunk; how many tokens it brought."""

    @abstractmethod
    def detokenize(self, texts: list[list[int]]) -> list[str]:
        """Text of token ids, special tokens included."""

    def run(
        self, prompts: Sequence[Prompt], concurrency: int, settings: Settings, on_done: OnDone
    ) -> tuple[list[RequestTrace], float]:
        """Answer every turn of every prompt; see ``Endpoint.run``."""
        return asyncio.run(self._run(prompts, concurrency, settings, on_done))

    async def _run(
        self, prompts: Sequence[Prompt], concurrency: int, settings: Settings, on_done: OnDone
    ) -> tuple[list[RequestTrace], float]:
        async with self.client.async_http(concurrency) as client:
            first = [await self.prepare(client, turns_of(p)[0], settings) for p in prompts]
            answers: list[list[RequestTrace]] = [[] for _ in prompts]
            waiting = iter(range(len(prompts)))

            async def work() -> None:
                for number in waiting:
                    prompt = prompts[number]
                    messages: list[Message] = []
                    for turn, added in enumerate(turns_of(prompt)):
                        messages += added
                        path, body = (
                            first[number]
                            if turn == 0
                            else await self.prepare(client, messages, settings)
                        )
                        observation = RequestTrace(prompt.id, turn, added[-1].content)
                        await self._send(client, path, body, observation)
                        answers[number].append(observation)
                        on_done(observation)
                        messages.append(Message(role="assistant", content=observation.text or " "))

            start = time.perf_counter()
            workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(prompts)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            seconds = time.perf_counter() - start
        return [observation for turns in answers for observation in turns], seconds

    async def _send(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any], observation: RequestTrace
    ) -> None:
        start = time.perf_counter()
        try:
            async for chunk in self.client.async_events(client, path, body):
                tokens = self.read(observation, chunk)
                if tokens:
                    now = time.perf_counter() - start
                    observation.first = observation.first or now
                    observation.last = now
                    observation.chunks.append(tokens)
        except httpx.HTTPError as error:
            raise ServerError(
                f"{self.client.display_url}{path} broke off ({type(error).__name__}: {error}) "
                f"during prompt {observation.prompt_id}: see the server's log"
            ) from error

    def passes_of(self, observation: RequestTrace) -> KeptPasses | None:
        """The passes that wrote an answer, taken from streamed chunks."""
        ids, chunks = observation.token_ids, observation.chunks
        if not ids or len(ids) != sum(chunks):
            return None
        texts = token_texts(ids, self.detokenize)
        exact = observation.passes == len(chunks) - 1
        passes, at = [], chunks[0]
        for count in chunks[1:]:
            *accepted, bonus = texts[at : at + count]
            passes.append(KeptPass(accepted=accepted, bonus=bonus))
            at += count
        note = "a pass is a streamed chunk; rejected drafts are not sent"
        if exact:
            note += "; the server counted as many passes"
        note += "; a stop or the limit may have cut the last pass"
        return KeptPasses(texts[: chunks[0]], passes, exact, note)


def token_texts(
    ids: Sequence[int], detokenize: Callable[[list[list[int]]], list[str]]
) -> list[str]:
    """Text that each token adds; a character of several tokens is given to the last of them.

    Args:
        ids: of an answer.
        detokenize: takes lists of ids, returns their texts.
    """
    prefixes = detokenize([list(ids[: n + 1]) for n in range(len(ids))])
    texts, shown = [], ""
    for prefix in prefixes:
        whole = prefix.rstrip("\ufffd")
        texts.append(whole[len(shown) :])
        shown = whole if len(whole) > len(shown) else shown
    return texts
