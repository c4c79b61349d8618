"""The live view, over scrapes that real servers gave, and over servers that misbehave."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from dflash_plugin.cli.main import app
from dflash_plugin.monitor.client import ServerClient
from dflash_plugin.monitor.metrics import (
    MetricsSnapshot,
    Samples,
    ServerError,
    rates_between,
    snapshot_of,
)
from dflash_plugin.monitor.top import View, scrape, sparkline, watch

METRICS = Path(__file__).parents[1] / "data" / "metrics"


def exposition(engine: str, number: int) -> str:
    return (METRICS / f"{engine}-{number}.txt").read_text()


def shown(view: View) -> str:
    console = Console(width=100, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


def client(*answers: str | int) -> ServerClient:
    """Of a server that answers these in turn; an integer is a status, -1 no connection."""
    left = iter(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        found = next(left)
        if found == -1:
            raise httpx.ConnectError("connection refused")
        if isinstance(found, int):
            return httpx.Response(found)
        return httpx.Response(200, text=found)

    return ServerClient("http://server:8000/v1", transport=httpx.MockTransport(answer))


def once(*answers: str | int, seconds: float = 2.0) -> View:
    ticks = iter([10.0, 10.0 + seconds])
    views = scrape(client(*answers), seconds, sleep=lambda _: None, clock=lambda: next(ticks))
    return next(views)


def test_vllm():
    view = once(exposition("vllm", 1), exposition("vllm", 2))
    first, last = snapshot_of(exposition("vllm", 1)), view.snapshot
    assert last.engine == "vllm"
    assert last.drafter["block_size"] == "8"
    # 65 passes in all accepted 186 drafts.
    assert (last.passes, sum(last.accepted.values())) == (65, 186)
    assert last.tau == pytest.approx(1 + 186 / 65)
    assert last.hit_rate == pytest.approx(64 / 216)
    passes = last.passes - first.passes
    accepted = sum(last.accepted.values()) - sum(first.accepted.values())
    assert view.rates.tau == pytest.approx(1 + accepted / passes)
    assert view.rates.tokens_per_second == pytest.approx((240 - first.generated) / 2)
    assert view.rates.by_position[0] == pytest.approx(
        (last.accepted[0] - first.accepted[0]) / passes
    )
    frame = shown(view)
    assert "vllm at http://server:8000" in frame
    assert f"{view.rates.tau:.2f}, 3.31 expected" in frame
    assert frame.count("at ") == 8
    assert "adaptive" not in frame


def test_sglang_with_adaptive_verification():
    view = once(exposition("sglang", 1), exposition("sglang", 2))
    rates = view.rates
    assert view.snapshot.engine == "sglang"
    assert rates.tau == pytest.approx(1 + (558 - 364) / 64)
    assert (rates.verified, rates.saved) == (1099 - 763, 294 - 168)
    assert rates.steps == {4: 16, 6: 31, 8: 19}
    assert rates.hit_rate == pytest.approx((139 - 62) / (222 - 133))
    assert rates.tokens_per_second == pytest.approx((820 - 542) / 2)
    frame = shown(view)
    assert "336 verified" in frame
    assert "27% saved" in frame
    assert re.search(r"6 rows +47%", frame)


def test_counters_that_begin_anew_are_not_negative():
    view = once(exposition("sglang", 2), exposition("sglang", 1))
    assert view.rates.restarted
    assert view.rates.tau == pytest.approx(1 + 364 / 128)
    assert view.rates.verified == 763
    assert min(view.rates.by_position) > 0
    # What was generated since then took an unknown time: the engine's own figure stands.
    assert view.rates.tokens_per_second == view.snapshot.tokens_per_second == 0
    assert "the server was restarted" in shown(view)


def test_an_idle_server_keeps_what_it_reached():
    view = once(exposition("vllm", 2), exposition("vllm", 2))
    assert view.rates.tau is None
    assert view.rates.tokens_per_second == 0
    assert "3.86, 3.31 expected" in shown(view)
    assert view.taus == type(view.taus)([], view.taus.maxlen)


def test_a_server_that_goes_away_is_waited_for():
    frames: list[str] = []
    texts = (exposition("vllm", 1), -1, 503, exposition("vllm", 2))

    def show(view: View) -> None:
        frames.append(shown(view))
        if len(frames) == len(texts):
            raise KeyboardInterrupt

    ticks = iter(range(100))
    view = watch(client(*texts), 1.0, show, sleep=lambda _: None, clock=lambda: float(next(ticks)))
    assert "cannot be reached (ConnectError: connection refused)" in " ".join(frames[1].split())
    assert "trying again" in frames[1]
    assert "expected" in frames[1]  # what was there stays
    assert "status 503" in frames[2]
    assert "trying again" not in frames[3]
    assert view.rates.tau is not None


def test_missing_metrics_name_the_flag():
    with pytest.raises(ServerError, match="SGLang with --enable-metrics"):
        once(404)
    with pytest.raises(ServerError, match="no metrics of vLLM or SGLang"):
        once("python_info 1\n")
    plain = once("vllm:num_requests_running 3\n", "vllm:num_requests_running 4\n")
    frame = " ".join(shown(plain).split())
    assert "4 running, – waiting" in frame
    assert "start vLLM with --speculative-method dflash" in frame
    native = "sglang:num_running_reqs 1\nsglang:spec_accept_length 2.5\n"
    frame = " ".join(shown(once(native, native)).split())
    assert "τ 2.50" in frame
    assert "acceptance by position comes with dflash-plugin" in frame


def test_text_that_is_not_prometheus_is_refused():
    with pytest.raises(ServerError, match="not Prometheus text"):
        once("<html><body class='x'>hello</body></html>")


def test_samples_are_summed_over_other_labels():
    samples = Samples(
        '# TYPE a counter\na_total{engine="0"} 2.0\na_total{engine="1"} 3\n'
        'b{position="1",x="say \\"}\\""} 1\nb{position="0"} 4\nb{position="0",x="z"} 2\n'
    )
    assert samples.count("a_total") == 5
    assert samples.count("z") is None
    assert samples.by("b", "position") == {0: 6, 1: 1}
    assert samples.labels("b")["x"] == 'say "}"'


def test_warnings_and_other_ranks():
    text = (
        'dflash:acceptance_warnings_total 2\nsglang:num_running_reqs{tp_rank="0"} 3\n'
        'sglang:num_running_reqs{tp_rank="1"} 3\nsglang:spec_accept_length 1.2\n'
        "sglang:gen_throughput NaN\n"
    )
    view = once(text, text)
    assert view.snapshot.running == 3
    assert view.snapshot.tokens_per_second is None
    assert "2 warnings: acceptance far below the record" in shown(view)


def test_sparkline():
    assert sparkline([1.0, 2.0, 3.0], 1.0, 3.0) == "▁▅█"
    assert sparkline([9.0, -9.0], 1.0, 3.0) == "█▁"
    assert sparkline([], 0, 1) == ""


def test_rates_of_a_server_without_anything():
    rates = rates_between(MetricsSnapshot(), MetricsSnapshot(), 1.0)
    assert (rates.tau, rates.tokens_per_second, rates.restarted) == (None, None, False)


@pytest.fixture
def server() -> Iterator[str]:
    """A server over HTTP that gives SGLang's two scrapes in turn, eight in all."""
    numbers = iter([1, 2] * 4)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/metrics"
            number = next(numbers, None)
            if number is None:
                return
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(exposition("sglang", number).encode())

        def log_message(self, *_: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def test_once_over_http(server):
    arguments = ["top", "--server", server, "--interval", "0.1", "--once"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "sglang at http://127.0.0.1" in result.output
    assert "4.03, 3.31 expected" in result.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["since_last"]["tau"] == pytest.approx(1 + (558 - 364) / 64)
    assert found["now"]["engine"] == "sglang"


def test_no_server_is_one_line():
    result = CliRunner().invoke(app, ["top", "--server", "127.0.0.1:1", "--once"])
    assert result.exit_code == 1
    assert "cannot be reached" in " ".join(result.output.split())


def test_without_a_terminal_there_is_a_line_an_interval(server):
    """The server answers eight scrapes, and then no more."""
    result = CliRunner().invoke(app, ["top", "--server", server, "--interval", "0.1"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 7
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d 0 running, 0 waiting, [\d,]+ tokens/s, τ 4\.03 \(3\.31 expected\), "
        r"at 1\.\. 0\.[\d. ]+, KV cache \d+%, prefix cache 87%, 27% of drafts saved",
        lines[0],
    )
    assert "the server was restarted" in lines[1]
    assert "cannot be reached" in " ".join(result.stderr.split())


def test_json_without_once_is_an_object_a_line(server):
    result = CliRunner().invoke(app, ["top", "--server", server, "--interval", "0.1", "--json"])
    assert result.exit_code == 1
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 7
    assert found[0]["since_last"]["tau"] == pytest.approx(1 + (558 - 364) / 64)
    assert found[1]["since_last"]["restarted"]


def test_an_interrupt_ends_the_lines_quietly(monkeypatch):
    snapshots = iter([snapshot_of(exposition("vllm", number)) for number in (1, 2)])

    def metrics(_: ServerClient) -> MetricsSnapshot:
        found = next(snapshots, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(ServerClient, "metrics", metrics)
    result = CliRunner().invoke(app, ["top", "--server", "server", "--interval", "0.1"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""
