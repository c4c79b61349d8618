"""What the servers of all engines share: requests in flight, streams, errors."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx

from dflash_plugin.bench.measurements import (
    Counters,
    Endpoint,
    KeptPasses,
    OnDone,
    RequestTrace,
    turns_of,
)
from dflash_plugin.bench.redact import without_credentials
from dflash_plugin.bench.schema import Pass, Role, Server, Settings
from dflash_plugin.errors import DFlashError
from dflash_plugin.monitor.client import Samples
from dflash_plugin.prompts import Message, Prompt

TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class HttpEndpoint(ABC):
    """A server.

    Args:
        url: its root, such as http://127.0.0.1:8000.
        api_key: sent as a bearer token.
    """

    by_request: str
    busy_client = True

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.shown = without_credentials(self.url)
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.model = ""

    @abstractmethod
    def describe(self, role: Role) -> Server:
        """What it is."""

    @abstractmethod
    def counters(self) -> Counters:
        """Its counters now."""

    @abstractmethod
    def fill_passes(self, observations: Sequence[RequestTrace], grown: Counters) -> str | None:
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

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Ask for one answer.

        Raises:
            DFlashError: the server cannot be reached.
        """
        try:
            with httpx.Client(timeout=TIMEOUT, headers=self.headers) as client:
                return client.request(method, self.url + path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self.shown, error) from error

    def get_json(self, path: str) -> dict[str, Any] | None:
        """A JSON object, or None where the server has no such path."""
        answer = self.request("GET", path)
        if answer.status_code in (401, 403):
            raise refused(self.shown, path, answer.status_code, answer.text)
        try:
            found = answer.json() if answer.status_code == 200 else None
        except json.JSONDecodeError:
            return None
        return found if isinstance(found, dict) else None

    def samples(self) -> Samples:
        """Its metrics; none where it exports none."""
        answer = self.request("GET", "/metrics")
        if answer.status_code in (401, 403):
            raise refused(self.shown, "/metrics", answer.status_code, answer.text)
        return Samples(answer.text if answer.status_code == 200 else "")

    def run(
        self, prompts: Sequence[Prompt], concurrency: int, settings: Settings, on_done: OnDone
    ) -> tuple[list[RequestTrace], float]:
        """Answer every turn of every prompt; see ``Endpoint.run``."""
        return asyncio.run(self._run(prompts, concurrency, settings, on_done))

    async def _run(
        self, prompts: Sequence[Prompt], concurrency: int, settings: Settings, on_done: OnDone
    ) -> tuple[list[RequestTrace], float]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        async with httpx.AsyncClient(
            base_url=self.url, timeout=TIMEOUT, limits=limits, headers=self.headers
        ) as client:
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
                        await self._ask(client, path, body, observation)
                        answers[number].append(observation)
                        on_done()
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

    async def _ask(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any], observation: RequestTrace
    ) -> None:
        start = time.perf_counter()
        try:
            async with client.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    text = (await answer.aread()).decode(errors="replace")
                    raise refused(self.shown, path, answer.status_code, text)
                async for chunk in events(answer.aiter_bytes()):
                    if "error" in chunk:
                        raise refused(self.shown, path, 200, json.dumps(chunk["error"]))
                    tokens = self.read(observation, chunk)
                    if tokens:
                        now = time.perf_counter() - start
                        observation.first = observation.first or now
                        observation.last = now
                        observation.chunks.append(tokens)
        except httpx.HTTPError as error:
            raise DFlashError(
                f"{self.shown}{path} broke off ({type(error).__name__}: {error}) during prompt "
                f"{observation.prompt_id}: see the server's log"
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
            passes.append(Pass(accepted=accepted, bonus=bonus))
            at += count
        note = "a pass is a streamed chunk; rejected drafts are not sent"
        if exact:
            note += "; the server counted as many passes"
        note += "; a stop or the limit may have cut the last pass"
        return KeptPasses(texts[: chunks[0]], passes, exact, note)


async def events(parts: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """JSON objects of a stream of server-sent events, until ``[DONE]``."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if line.startswith(b"data:") and data:
                yield json.loads(data)


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


def unreachable(url: str, error: Exception) -> DFlashError:
    """No answer."""
    return DFlashError(
        f"{url} cannot be reached ({type(error).__name__}: {error}): start the server, or give the "
        "URL that it prints, such as http://127.0.0.1:8000"
    )


def refused(url: str, path: str, status: int, text: str) -> DFlashError:
    """An answer that is an error, with what mends the usual ones."""
    advice = "see the server's log"
    if status in (401, 403):
        advice = "give its key in the environment as DFLASH_BENCH_API_KEY"
    elif status == 404:
        advice = "give the server's root as URL, without a path, and start it with an OpenAI API"
    elif "chat template" in text or "chat_template" in text:
        advice = "serve an instruction-tuned model, or start the server with --chat-template"
    elif status == 400 or "max_model_len" in text or "context" in text:
        advice = "lower --max-tokens, or raise the server's context length"
    return DFlashError(f"{url}{path} answered {status}: {text[:300].strip()}: {advice}")


def settle(endpoint: Endpoint, before: Counters, tokens: int, seconds: float = 3.0) -> Counters:
    """Counters once they hold a run's tokens, or stand still; servers count a little later.

    Args:
        endpoint: whose counters.
        before: as they stood before the run.
        tokens: of the run.
        seconds: to wait at most.
    """
    until = time.monotonic() + seconds
    last: Counters | None = None
    while True:
        now = endpoint.counters()
        grown = now.since(before)
        done = grown.tokens is None or grown.tokens >= tokens
        if (done and now == last) or time.monotonic() > until:
            return now
        last = now
        time.sleep(0.05)
