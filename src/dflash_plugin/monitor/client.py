"""HTTP client of a running server, which bench, doctor and top share."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

import httpx

from dflash_plugin.errors import reason
from dflash_plugin.monitor.metrics import MetricsSnapshot, Samples, ServerError, snapshot_of
from dflash_plugin.monitor.redact import without_credentials

API_KEY_VARIABLE = "DFLASH_BENCH_API_KEY"
# Seconds that metrics and information may take, and an answer of tokens.
METRICS_TIMEOUT = httpx.Timeout(5.0)
ANSWER_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
# Seconds in which a server's counters follow its answers.
SETTLE_SECONDS = 3.0

T = TypeVar("T")


class ServerClient:
    """Sends requests to one server.

    Args:
        url: of the server, such as http://localhost:8000; the scheme and a trailing /v1 may be
            missing or there.
        api_key: sent as a bearer token.
        timeout: of metrics and information.
        transport: of httpx; for tests.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: httpx.Timeout = METRICS_TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        self.display_url = without_credentials(self.url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A server closes idle connections when it likes, also while a request is on its way.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(
            timeout=timeout, headers=self._headers, limits=limits, transport=transport
        )

    def async_http(self, connections: int) -> httpx.AsyncClient:
        """An asynchronous client of the same server, for ``async_events``.

        Args:
            connections: kept open between requests.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=connections)
        return httpx.AsyncClient(
            base_url=self.url, timeout=ANSWER_TIMEOUT, limits=limits, headers=self._headers
        )

    def request(
        self, method: str, path: str, body: Any = None, timeout: httpx.Timeout | None = None
    ) -> httpx.Response:
        """Send one request.

        Args:
            method, path, body: of the request; the body is sent as JSON.
            timeout: the client's own when None.

        Raises:
            ServerError: the server cannot be reached, or wants another key.
        """
        more: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            answer = self._http.request(method, self.url + path, json=body, **more)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self.unreachable(error) from error
        if answer.status_code in (401, 403):
            raise self.refused(path, answer.status_code, answer.text)
        return answer

    def get_json(self, path: str) -> dict[str, Any] | None:
        """A JSON object, or None where the server has no such path.

        Raises:
            ServerError: the server cannot be reached, or wants another key.
        """
        answer = self.request("GET", path)
        try:
            found = answer.json() if answer.status_code == 200 else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def post_json(self, path: str, body: Any) -> dict[str, Any]:
        """The JSON object that answers a request for tokens.

        Raises:
            ServerError: the server cannot be reached, or refuses the request.
        """
        answer = self.request("POST", path, body, ANSWER_TIMEOUT)
        if answer.status_code != 200:
            raise self.refused(path, answer.status_code, answer.text)
        found: dict[str, Any] = answer.json()
        return found

    def samples(self) -> Samples:
        """Samples of ``/metrics``; none where the server exports none.

        Raises:
            ServerError: the server cannot be reached, or ``/metrics`` is not Prometheus text.
        """
        answer = self.request("GET", "/metrics")
        return Samples(answer.text if answer.status_code == 200 else "")

    def metrics(self) -> MetricsSnapshot:
        """Scrape ``/metrics``.

        Raises:
            ServerError: the server cannot be reached, or exports no metrics of an engine.
        """
        answer = self.request("GET", "/metrics")
        found = snapshot_of(answer.text) if answer.status_code == 200 else MetricsSnapshot()
        if found.engine is None:
            status = "" if answer.status_code == 200 else f" (status {answer.status_code})"
            raise ServerError(
                f"{self.display_url}/metrics has no metrics of vLLM or SGLang{status}: give the "
                "root URL of one, and start SGLang with --enable-metrics, vLLM without "
                "--disable-log-stats"
            )
        return found

    def info(self) -> dict[str, Any] | None:
        """SGLang's ``/server_info``; None where there is no such page.

        Raises:
            ServerError: the server cannot be reached, or wants another key.
        """
        return self.get_json("/server_info")

    def events(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """JSON objects of a streamed answer.

        Raises:
            ServerError: the server cannot be reached, refuses the request, or breaks off.
        """
        parser = EventParser()
        try:
            with self._http.stream(
                "POST", self.url + path, json=body, timeout=ANSWER_TIMEOUT
            ) as answer:
                if answer.status_code != 200:
                    text = answer.read().decode(errors="replace")
                    raise self.refused(path, answer.status_code, text)
                for part in answer.iter_bytes():
                    yield from self._checked(path, parser.feed(part))
        except httpx.HTTPError as error:
            raise self.unreachable(error) from error

    async def async_post_json(
        self, http: httpx.AsyncClient, path: str, body: Any
    ) -> dict[str, Any]:
        """The JSON object that answers a request.

        Args:
            http: from ``async_http``.
            path, body: of the request.

        Raises:
            ServerError: the server cannot be reached, or refuses the request.
        """
        try:
            answer = await http.post(path, json=body)
        except httpx.HTTPError as error:
            raise self.unreachable(error) from error
        if answer.status_code != 200:
            raise self.refused(path, answer.status_code, answer.text)
        found: dict[str, Any] = answer.json()
        return found

    async def async_events(
        self, http: httpx.AsyncClient, path: str, body: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """JSON objects of a streamed answer.

        Args:
            http: from ``async_http``.
            path, body: of the request.

        Raises:
            ServerError: the server refuses the request, or sends an error.
            httpx.HTTPError: the stream broke off.
        """
        parser = EventParser()
        async with http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                raise self.refused(path, answer.status_code, text)
            async for part in answer.aiter_bytes():
                for event in self._checked(path, parser.feed(part)):
                    yield event

    def _checked(self, path: str, events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for event in events:
            if "error" in event:
                raise self.refused(path, 200, json.dumps(event["error"]))
            yield event

    def unreachable(self, error: Exception) -> ServerError:
        """The error of a request that got no answer."""
        return ServerError(
            f"{self.display_url} cannot be reached ({type(error).__name__}: {reason(error)}): "
            "start the server, or give the URL that it prints, such as http://127.0.0.1:8000"
        )

    def refused(self, path: str, status: int, text: str) -> ServerError:
        """The error of an answer that is one, with what mends the usual ones."""
        advice = "see the server's log"
        if status in (401, 403):
            advice = f"give its key in the environment as {API_KEY_VARIABLE}"
        elif status == 404:
            advice = (
                "give the server's root as URL, without a path, and start it with an OpenAI API"
            )
        elif "chat template" in text or "chat_template" in text:
            advice = "serve an instruction-tuned model, or start the server with --chat-template"
        elif status == 400 or "max_model_len" in text or "context" in text:
            advice = (
                "lower --max-tokens (doctor: --max-new-tokens), or raise the server's context "
                "length"
            )
        return ServerError(
            f"{self.display_url}{path} answered {status}: {text[:300].strip()}: {advice}"
        )


class EventParser:
    """Takes a stream of server-sent events apart."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, part: bytes) -> list[dict[str, Any]]:
        """JSON objects of the events that ``part`` completes; ``[DONE]`` is left out.

        Raises:
            ServerError: an event is not JSON.
        """
        *lines, self._rest = (self._rest + part).split(b"\n")
        found = []
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data and data != b"[DONE]":
                try:
                    found.append(json.loads(data))
                except ValueError as error:
                    raise ServerError(
                        f"the server streams {data[:80]!r}, which is not JSON ({reason(error)}): "
                        "give the root URL of a vLLM or SGLang server"
                    ) from error
        return found


def settle(
    read: Callable[[], T],
    done: Callable[[T], bool],
    counters: Callable[[T], Any] = lambda found: found,
    seconds: float = SETTLE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Read a server's counters until they hold what it wrote and stand still.

    Servers count a little later than they answer.

    Args:
        read: gives the counters.
        done: whether they hold everything.
        counters: what has to stand still, of what was read.
        seconds: to wait at most.
        sleep: the time's.
    """
    until = time.monotonic() + seconds
    last: Any = object()
    while True:
        now = read()
        if (done(now) and counters(now) == last) or time.monotonic() > until:
            return now
        last = counters(now)
        sleep(0.05)
