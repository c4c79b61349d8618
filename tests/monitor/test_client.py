"""The client that bench, doctor and top share, against servers that answer by plan."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from dflash_plugin.cli.main import app
from dflash_plugin.doctor.server import inspect_server
from dflash_plugin.monitor.client import EventParser, ServerClient, settle
from dflash_plugin.monitor.metrics import ServerError
from tests.helpers.fake_server import serving


def answering(status: int, text: str) -> ServerClient:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=text))
    return ServerClient("http://me:pw@server:8000", transport=transport)


@pytest.mark.parametrize(
    "url", ["server:8000", "http://server:8000", "http://server:8000/", "server:8000/v1/"]
)
def test_every_spelling_of_a_url_is_one(url):
    assert ServerClient(url).url == "http://server:8000"


def test_no_message_tells_the_password():
    with pytest.raises(ServerError, match="http://server:8000/x answered 403") as error:
        answering(403, "no").request("GET", "/x")
    assert "pw" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "text", "advice"),
    [
        (401, "", "DFLASH_BENCH_API_KEY"),
        (404, "Not Found", "the server's root as URL"),
        (400, "no chat template", "--chat-template"),
        (400, "longer than the context length", "lower --max-tokens"),
        (500, "oom", "see the server's log"),
    ],
)
def test_a_refusal_says_what_mends_it(status, text, advice):
    client = answering(status, text)
    with pytest.raises(ServerError, match=f"answered {status}.*{advice}"):
        client.post_json("/generate", {})
    with pytest.raises(ServerError, match=f"answered {status}.*{advice}"):
        list(client.events("/generate", {}))


def test_a_missing_page_is_none_and_a_refused_one_an_error():
    assert answering(404, "{}").info() is None
    assert answering(200, "no JSON").info() is None
    assert answering(200, "[1]").info() is None
    for status in (401, 403):
        with pytest.raises(ServerError, match="DFLASH_BENCH_API_KEY"):
            answering(status, "{}").info()


def test_events_are_parsed_across_parts():
    parser = EventParser()
    stream = b'data: {"a": 1}\r\n\n: a comment\ndata: {"b": "\xc3\xa4"}\n\ndata: [DONE]\n\n'
    for size in (1, 3, len(stream)):
        parts = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [e for part in parts for e in parser.feed(part)] == [{"a": 1}, {"b": "ä"}]
    with pytest.raises(ServerError, match="not JSON"):
        parser.feed(b"data: <html>\n")


def test_streams_are_the_same_with_and_without_asyncio():
    body = {"messages": [{"role": "user", "content": "a"}]}

    async def streamed(client: ServerClient) -> list[dict[str, Any]]:
        async with client.async_http(1) as http:
            return [e async for e in client.async_events(http, "/v1/chat/completions", body)]

    with serving("vllm", plans={"a": (2, 0)}) as fake:
        client = ServerClient(fake.url)
        events = list(client.events("/v1/chat/completions", body))
        assert events == asyncio.run(streamed(client))
    assert events[-1]["usage"]["completion_tokens"] == 5


def test_an_error_within_a_stream_is_raised():
    with pytest.raises(ServerError, match=r"answered 200: .*out of memory"):
        list(answering(200, 'data: {"error": "out of memory"}\n\n').events("/generate", {}))


def test_a_server_with_a_key_tells_the_drafters_state():
    """SGLang wants the key for everything but /health and /metrics."""
    with serving("sglang", api_key="secret") as fake:
        found = inspect_server(ServerClient(fake.url, "secret"))
        assert found.plugin
        assert found.drafts == 5
        for key in (None, "wrong"):
            with pytest.raises(ServerError, match=r"/server_info answered 401.*_API_KEY"):
                inspect_server(ServerClient(fake.url, key))


def test_doctor_without_the_key_says_so_and_does_not_draft():
    with serving("sglang", api_key="secret") as fake:
        result = CliRunner().invoke(app, ["doctor", "--server", fake.url], env={})
    assert result.exit_code == 2
    assert "DFLASH_BENCH_API_KEY" in result.output


def test_top_sends_its_key():
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers.get("Authorization"))
        return httpx.Response(200, text="vllm:num_requests_running 1\n")

    ServerClient("server", "secret", transport=httpx.MockTransport(answer)).metrics()
    assert keys == ["Bearer secret"]
    shown = CliRunner().invoke(app, ["top", "--help"], env={"COLUMNS": "200"}).output
    assert "--api-key" in shown
    assert "DFLASH_BENCH_API_KEY" in shown


def test_settling_waits_until_counters_stand_still():
    values = iter([1, 4, 5, 5])
    assert settle(lambda: next(values), lambda now: now >= 4, sleep=lambda _: None) == 5
    assert next(values, None) is None


def test_settling_gives_up():
    assert settle(lambda: 1, lambda now: now >= 4, seconds=0.0, sleep=lambda _: None) == 1


def test_settling_ignores_what_is_no_counter():
    values = iter([(1, 0.5), (1, 0.7)])
    found = settle(lambda: next(values), lambda _: True, lambda now: now[0], sleep=lambda _: None)
    assert found == (1, 0.7)
