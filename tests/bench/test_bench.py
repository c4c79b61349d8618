"""``dflash-plugin bench`` against servers that answer by plan."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dflash_plugin.bench import data, metrics
from dflash_plugin.bench.http_endpoint import token_texts
from dflash_plugin.bench.measurements import turns_of
from dflash_plugin.bench.report import page
from dflash_plugin.bench.schema import Record, Server, read_record
from dflash_plugin.bench.speculation import pair_of
from dflash_plugin.bench.sweep import connect
from dflash_plugin.cli.main import app
from dflash_plugin.errors import DFlashError
from dflash_plugin.monitor.redact import without_credentials, without_secrets
from dflash_plugin.prompts import Message, Prompt
from tests.helpers.fake_server import DRAFTS, serving
from tests.helpers.tiny import write_target, write_tiny

# Request a commits 4 tokens in 2 passes, request b 6 in 1.
PLANS = {"a": (2, 0), "b": (5,)}


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def write(path: Path, *items: dict) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "own.jsonl", {"prompt": "a"}, {"prompt": "b"})


@pytest.fixture
def output(tmp_path):
    return tmp_path / "result.json"


def measure(fake, prompts, output, *options) -> Record:
    arguments = ("--data", prompts, "--concurrency", "1", "--repeats", 1, "-o", output)
    run(fake.url, *arguments, *options)
    return read_record(output)


def test_three_averages():
    """τ of the requests is 2 and 6."""
    committed, passes = [4, 6, 0], [2, 1, 0]
    assert metrics.mean_per_request(committed, passes) == 4
    assert metrics.pooled(committed, passes) == pytest.approx(10 / 3)
    assert metrics.token_weighted(committed, passes) == pytest.approx(4.4)
    assert metrics.pooled([0], [0]) is None


def test_percentiles_are_interpolated():
    found = metrics.percentiles([0.001 * n for n in range(1, 12)])
    assert (found.p50, found.p90, found.p99) == (6.0, 10.0, 10.9)
    assert metrics.percentiles([]) is None


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_numbers_of_a_server(kind, prompts, output):
    with serving(kind, plans=PLANS) as fake:
        record = measure(fake, prompts, output, "--repeats", 2, "--max-tokens", 9)
    assert record.complete
    (server,) = record.servers
    assert (server.engine, server.plugin_version, server.num_drafts) == (kind, "9.9", DRAFTS)
    (cell,) = record.cells
    assert (cell.set_name, cell.concurrency, len(cell.repeats)) == ("own", 1, 2)
    assert cell.repeats[0].tokens == 5 + 7
    assert cell.passes == 2 * 3
    assert cell.tau.mean_per_request == 4
    assert cell.tau.pooled == pytest.approx(10 / 3)
    assert cell.tau.token_weighted == pytest.approx(4.4)
    third = pytest.approx(1 / 3)
    assert cell.acceptance.unconditional == [2 * third.expected, 2 * third.expected, *[third] * 3]
    assert cell.acceptance.conditional == [2 / 3, 1.0, 0.5, 1.0, 1.0]
    tokens, passes = cell.repeats[1].checks
    assert (passes.what, passes.client, passes.server, passes.agrees) == ("passes", 3, 3, True)
    if kind == "vllm":
        assert (tokens.client, tokens.server, tokens.agrees) == (12, 12, True)
    else:
        assert (tokens.client, tokens.server, tokens.agrees) == (12, None, None)
        assert "--enable-metrics" in tokens.note
        assert server.gpus == 2
        assert "api_key" not in server.flags
    assert cell.tokens_per_second > 0 < cell.ttft_ms.p50 <= cell.ttft_ms.p99
    assert cell.per_user == pytest.approx(1000 / cell.tpot_ms.p50, rel=0.01)


def test_chunks_that_hold_several_passes_leave_the_pooled_average(prompts, output):
    """vLLM counts passes of all requests together only."""
    with serving("vllm", plans=PLANS, merged=True) as fake:
        record = measure(fake, prompts, output, "--keep-text", 1)
    (cell,) = record.cells
    assert cell.tau.pooled == pytest.approx(10 / 3)
    assert cell.tau.mean_per_request is None
    assert cell.tau.token_weighted is None
    assert "2 chunks were streamed for 3 verify passes" in cell.tau.sources["mean_per_request"]
    assert [check.agrees for check in cell.repeats[0].checks] == [True, None]
    assert not record.texts[0].exact


def test_a_server_that_counts_otherwise_is_found_out(prompts, output):
    with serving("vllm", plans=PLANS, miscounted=3) as fake:
        printed = run(fake.url, "--data", prompts, "--concurrency", 1, "-o", output)
    tokens = read_record(output).cells[0].repeats[0].checks[0]
    assert (tokens.client, tokens.server, tokens.agrees) == (12, 18, False)
    assert "DIFFER" in printed


def test_passes_without_drafts_count_as_passes():
    """vLLM's counters leave them out; a request of 1 + 6 tokens had 4 + 2 such passes."""
    from dflash_plugin.bench.measurements import Counters, RequestTrace

    sources = dict.fromkeys(("tokens", "passes", "accepted"), "counter")
    grown = Counters(7, 2, (2, 0), sources)
    tau = metrics.tau_of([RequestTrace("p", 0, "", tokens=7)], grown, "", "not told")
    assert tau.pooled == pytest.approx(6 / 4)
    assert "2 passes without drafts" in tau.sources["pooled"]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_baseline_runs_in_turns_on_the_same_prompts(kind, prompts, output):
    order = []
    with serving(kind, plans=PLANS) as fake, serving(kind, speculative=False, plans=PLANS) as plain:
        fake.on_request = lambda _: order.append("measured")
        plain.on_request = lambda _: order.append("baseline")
        options = ("--baseline", plain.url, "--repeats", 2, "--no-warmup")
        record = measure(fake, prompts, output, *options)
        asked = [[body["messages"] for body in one.seen] for one in (fake, plain)]
    assert order == ["measured"] * 2 + ["baseline"] * 2 + ["measured"] * 2 + ["baseline"] * 2
    assert asked[0] == asked[1]
    baseline = record.cell("baseline", "own", 1)
    assert baseline.repeats[0].tokens == 12
    assert baseline.tau.pooled is None
    assert baseline.tau.sources["pooled"]
    assert baseline.acceptance.unconditional is None


def test_a_baseline_may_draft_by_another_method_on_vllm(prompts, output):
    """N-gram search finds no drafts for a's second pass, which vLLM then does not count."""
    ngram = {"method": "ngram", "finds_nothing": True, "plans": PLANS}
    started = """vllm serve m --speculative-config '{"method": "ngram", "prompt_lookup_max": 4}'"""
    with serving("vllm", plans=PLANS) as fake, serving("vllm", **ngram) as other:
        printed = run(
            fake.url, "--baseline", other.url, "--baseline-command", started, "--data", prompts,
            "--concurrency", 1, "--repeats", 1, "-o", output,
        )  # fmt: skip
    record = read_record(output)
    baseline = record.server("baseline")
    assert (baseline.speculative, baseline.plugin_version) == (True, None)
    assert pair_of(baseline) == "fake with ngram drafts"
    cell = record.cell("baseline", "own", 1)
    assert cell.tau.pooled == pytest.approx(10 / 3)
    assert "and 1 passes without drafts" in cell.tau.sources["pooled"]
    assert cell.tau.mean_per_request is None
    assert "3 chunks were streamed for 2 verify passes" in cell.tau.sources["mean_per_request"]
    assert cell.acceptance.unconditional == [1, 1, 0.5, 0.5, 0.5]
    assert "1 passes without drafts are left out" in cell.acceptance.source
    assert "3.33" in printed.split("baseline's τ")[1]
    text = page([record])
    assert "The baseline is fake with ngram drafts." in text
    assert "line at 1 the baseline is faster" in text


def test_a_baseline_may_draft_by_another_method_on_sglang(prompts, output):
    """A tree of 5 drafts whose branches have 3."""
    tree = {"speculative_eagle_topk": 2, "speculative_num_steps": 3}
    plans = {"a": (2, 0), "b": (3, 1)}
    eagle = {"method": "eagle", "plans": plans, "settings": tree}
    with serving("sglang", plans=PLANS) as fake, serving("sglang", **eagle) as other:
        record = measure(fake, prompts, output, "--baseline", other.url)
    baseline = record.server("baseline")
    assert (baseline.num_drafts, baseline.plugin_version) == (3, None)
    assert pair_of(baseline) == "fake with EAGLE drafts"
    cell = record.cell("baseline", "own", 1)
    assert cell.tau.pooled == pytest.approx(10 / 4)
    assert cell.acceptance.unconditional == [0.75, 0.5, 0.25]


def test_a_baseline_without_metrics_is_not_called_one_without_a_drafter(prompts, output):
    with serving("vllm", plans=PLANS) as fake, serving("vllm", exported=False) as other:
        record = measure(fake, prompts, output, "--baseline", other.url)
        run(
            other.url,
            "--data",
            prompts,
            "--concurrency",
            1,
            "-o",
            output.with_name("x.json"),
            code=1,
        )
    baseline = record.server("baseline")
    assert baseline.speculative is None
    assert "whether it drafts is not known" in baseline.notes[0]
    cell = record.cell("baseline", "own", 1)
    assert cell.tokens_per_second > 0
    assert cell.tau.pooled is None
    assert "/metrics has no" in cell.tau.sources["pooled"]
    assert "fake with or without drafts (untold)" in page([record])
    baseline.describe_further(None, None, "vllm serve m --speculative-method ngram")
    assert pair_of(baseline) == "fake with ngram drafts, which it does not count"


@pytest.mark.parametrize(
    ("flags", "pair"),
    [
        ({"speculative_config": {"method": "eagle3", "model": "o/e"}}, "m with drafter e (eagle3)"),
        ({"speculative_config": {"method": "ngram", "model": "org/m"}}, "m with ngram drafts"),
        ({"speculative_draft_model_path": "d"}, "m with drafter d"),
        ("sglang --speculative-algorithm=NGRAM", "m with NGRAM drafts"),
        (None, "m with drafter (name untold)"),
    ],
)
def test_how_a_server_speculates_is_told_by_its_flags(flags, pair):
    server = Server(role="baseline", engine="vllm", model="org/m", speculative=True, flags=flags)
    assert pair_of(server) == pair


def test_as_many_requests_are_in_flight_as_asked_for(tmp_path, output):
    """Each waits until another one has come too."""
    meeting = threading.Barrier(2)
    four = write(tmp_path / "own.jsonl", *({"prompt": str(n)} for n in range(4)))
    with serving("vllm", on_request=lambda _: meeting.wait(20)) as fake:
        record = measure(fake, four, output, "--concurrency", "2", "--no-warmup")
    assert fake.max_active == 2
    assert record.cells[0].repeats[0].requests == 4


def test_what_is_asked_for_reaches_the_server(prompts, output):
    options = ("--temperature", 0.7, "--seed", 3, "--ignore-eos", "--thinking", "off")
    with serving("vllm") as fake:
        measure(fake, prompts, output, *options, "--max-tokens", 9)
    body = fake.seen[0]
    assert body["stream"] is body["ignore_eos"] is True
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.7, 3, 9)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    output.unlink()
    with serving("sglang") as fake:
        measure(fake, prompts, output, *options)
    assert fake.seen[0]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_second_turn_sends_the_first_answer_back(kind, tmp_path, output):
    chat = write(tmp_path / "mt_bench.jsonl", {"turns": ["a", "b"]})
    with serving(kind, plans=PLANS) as fake:
        record = measure(fake, chat, output, "--no-warmup")
    second = fake.seen[1]["messages"]
    assert [(m["role"], m["content"]) for m in second] == [
        ("user", "a"), ("assistant", " t0 t1 t2 t3 t4"), ("user", "b")
    ]  # fmt: skip
    assert record.cells[0].repeats[0].requests == 2


def test_turns_of_a_conversation_with_its_answers_are_kept():
    roles = ("system", "user", "assistant", "user", "user")
    messages = tuple(Message(role=role, content=str(n)) for n, role in enumerate(roles))
    turns = turns_of(Prompt(id="x", messages=messages))
    assert [[m.content for m in turn] for turn in turns] == [["0", "1", "2", "3"], ["4"]]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_kept_answers_show_their_passes(kind, prompts, output):
    with serving(kind, plans=PLANS) as fake:
        record = measure(fake, prompts, output, "--keep-text", 1)
    (kept,) = record.texts
    assert kept.first == [" t0"]
    assert [(p.accepted, p.bonus, p.rejected) for p in kept.passes] == [
        ([" t1", " t2"], " t3", None), ([], " t4", None)
    ]  # fmt: skip
    assert kept.exact


def test_a_character_of_several_tokens_is_shown_whole():
    pieces = [b"a", b"\xe2\x82", b"\xac", b"b"]

    def detokenize(texts):
        return [b"".join(pieces[n] for n in ids).decode(errors="replace") for ids in texts]

    assert token_texts([0, 1, 2, 3], detokenize) == ["a", "", "€", "b"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background of a script, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupting_keeps_what_was_measured(tmp_path, prompts, output):
    """Ctrl-C while the second cell waits for its answer."""
    never = threading.Event()

    def interrupt(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            never.wait(20)

    with serving("vllm", plans=PLANS, on_request=interrupt) as fake:
        other = write(tmp_path / "second.jsonl", {"prompt": "a"})
        printed = run(
            fake.url, "--data", prompts, "--data", other, "--concurrency", 1, "--repeats", 1,
            "--no-warmup", "-o", output, code=130,
        )  # fmt: skip
        never.set()
    record = read_record(output)
    assert not record.complete
    assert [cell.set_name for cell in record.cells] == ["own"]
    assert "2 requests of 1 cells are in" in printed


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_interrupting_a_run_keeps_its_finished_requests(kind, prompts, output):
    """Ctrl-C in the second run, while its second request waits for its answer."""
    never = threading.Event()
    asked = []

    def interrupt(number: int) -> None:
        asked.append(number)
        if len(asked) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            never.wait(20)

    with serving(kind, plans=PLANS, on_request=interrupt) as fake:
        printed = run(
            fake.url, "--data", prompts, "--concurrency", 1, "--repeats", 3, "--no-warmup",
            "-o", output, code=130,
        )  # fmt: skip
        never.set()
    record = read_record(output)
    assert not record.complete
    (cell,) = record.cells
    assert [repeat.requests for repeat in cell.repeats] == [2, 1]
    assert cell.repeats[1].tokens == 5
    # Speed is that of the whole run; what is cut off would make it look slow.
    assert cell.tokens_per_second == cell.repeats[0].tokens_per_second
    assert [check.agrees for check in cell.repeats[1].checks] == [None, None]
    assert "not finished" in cell.repeats[1].checks[0].note
    # SGLang's answers tell their passes; vLLM's counter holds the unfinished request's too.
    assert cell.passes == (3 + 2 if kind == "sglang" else 3)
    assert cell.tau.pooled == pytest.approx(14 / 5 if kind == "sglang" else 10 / 3)
    assert cell.acceptance.unconditional is not None
    assert "3 requests of 1 cells are in" in printed


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_that_dies_leaves_the_finished_requests(kind, prompts, output):
    with serving(kind, plans=PLANS, dies_at=1) as fake:
        printed = run(
            fake.url, "--data", prompts, "--concurrency", 1, "--repeats", 3, "--no-warmup",
            "-o", output, code=1,
        )  # fmt: skip
    record = read_record(output)
    assert not record.complete
    (cell,) = record.cells
    assert [(r.requests, r.tokens) for r in cell.repeats] == [(1, 5)]
    assert cell.ttft_ms is not None
    assert cell.tokens_per_second > 0
    if kind == "sglang":
        assert cell.tau.pooled == 2
    else:
        assert cell.tau.pooled is None
        assert "interrupted" in cell.tau.sources["pooled"]
    assert "broke off" in printed
    assert "1 requests of 1 cells are in" in printed


def test_nothing_is_written_where_nothing_was_finished(prompts, output):
    with serving("vllm", error=(500, "out of memory")) as fake:
        printed = run(fake.url, "--data", prompts, "--concurrency", 1, "-o", output, code=1)
    assert "nothing is kept" in printed
    assert not output.exists()


@pytest.mark.usefixtures("interruptible")
def test_interrupting_the_engine_keeps_finished_requests(tmp_path, output, monkeypatch):
    from dflash_plugin.bench import embedded

    def interrupted(engine, requests, on_tokens):
        """The second request is cut off by Ctrl-C after its first token."""
        for tokens in ([7], [8, 9, 10], [11]):
            on_tokens(0, tokens)
        on_tokens(1, [7])
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "generate_timed", interrupted)
    target, drafter = write_target(tmp_path / "target"), write_tiny(tmp_path / "drafter")
    own = write(tmp_path / "own.jsonl", {"prompt": "w1 w9"}, {"prompt": "w2"})
    printed = run(
        "--target", target, "--drafter", drafter, "--data", own, "--concurrency", 2, "--repeats", 1,
        "--max-tokens", 5, "--no-warmup", "--ignore-eos", "-o", output, code=130,
    )  # fmt: skip
    (cell,) = read_record(output).cells
    assert [(r.requests, r.tokens) for r in cell.repeats] == [(1, 5)]
    assert cell.tau.pooled == 2
    assert "1 requests of 1 cells are in" in printed


def test_the_engine_tells_rejected_drafts(tmp_path, output):
    target, drafter = write_target(tmp_path / "target"), write_tiny(tmp_path / "drafter")
    chat = write(tmp_path / "own.jsonl", *({"turns": [f"w{n} w9", "w4"]} for n in range(3)))
    run(
        "--target", target, "--drafter", drafter, "--data", chat, "--concurrency", "1,2",
        "--repeats", 1, "--max-tokens", 8, "--ignore-eos", "--keep-text", 2, "--baseline", "alone",
        "-o", output,
    )  # fmt: skip
    record = read_record(output)
    assert len(record.cells) == 4
    for cell in record.cells:
        assert cell.repeats[0].tokens == 6 * 8
        assert cell.repeats[0].checks[0].agrees is True
    ours = record.cell("measured", "own", 2)
    assert ours.repeats[0].checks[1].agrees is True
    assert ours.tau.pooled == pytest.approx(6 * 7 / ours.passes)
    assert len(ours.acceptance.unconditional) == record.servers[0].num_drafts
    kept = next(text for text in record.texts if text.role == "measured")
    assert kept.exact
    for one in kept.passes[:-1]:
        assert one.bonus is not None
        assert len(one.accepted) + len(one.rejected) == record.servers[0].num_drafts


def test_record_says_what_was_run(prompts, output, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["x", "bench", "http://me:pw@host", "--server-command", "serve"]
    )
    with serving("vllm") as fake:
        options = ("--label", "mine", "--gpu", "H100", "--gpus", 2)
        command = ("--server-command", "vllm serve m --api-key abc --port 1")
        record = measure(fake, prompts, output, *options, *command)
    assert record.command == "dflash-plugin bench http://host --server-command serve"
    (server,) = record.servers
    assert (record.label, server.gpu, server.gpus) == ("mine", "H100", 2)
    assert server.flags == "vllm serve m --api-key … --port 1"
    assert record.version == 1


def test_credentials_are_left_out():
    assert without_credentials("see http://u:p@h:1/v1?x") == "see http://h:1/v1?x"
    flags = {"api_key": "x", "tp_size": 2, "off": None, "in": {"hf_token": "x", "a": [1]}}
    assert without_secrets(flags) == {"tp_size": 2, "in": {"a": [1]}}


def test_sets_come_from_the_hub_once(tmp_path):
    asked = []

    def download(*arguments, split):
        asked.append((*arguments, split))
        return [{"problem": "1 + 1", "answer": "2"}]

    for _ in range(2):
        path = data.fetch("math500", tmp_path, download)
    assert asked == [("HuggingFaceH4/MATH-500", "test")]
    (prompt,) = data.load_sets([str(path)], None)["math500"]
    assert prompt.messages[0].content.startswith("1 + 1\nPlease reason step by step")


def test_a_hub_out_of_reach_is_said(tmp_path):
    def download(*arguments, split):
        raise OSError("no route")

    with pytest.raises(DFlashError, match=r"mt_bench.*no route.*--data FILE"):
        data.fetch("mt_bench", tmp_path, download)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("http://127.0.0.1:9", "--data", "own.jsonl"), "http://127.0.0.1:9 cannot be reached"),
        (("host:8000", "--data", "own.jsonl"), "host:8000 cannot be reached"),
        ((), "give --data FILE.jsonl"),
        (("--data", "gsm9k"), "'gsm9k' is neither a file nor one of gsm8k"),
        (("--data", "empty.jsonl"), "holds no prompt"),
        (("--data", "own.jsonl", "--data", "own.jsonl"), "a second set named 'own'"),
        (("--data", "own.jsonl", "--concurrency", "x"), "--concurrency is 'x'"),
        (("--data", "own.jsonl", "--concurrency", "0"), "--concurrency is [0]"),
        (("--data", "own.jsonl", "--concurrency", "4"), "own has 2"),
        (("--data", "own.jsonl", "--repeats", "0"), "--repeats is 0"),
        (("--data", "own.jsonl", "-o", "old.json"), "'old.json' is already there"),
        (("--data", "own.jsonl", "-o", "no/x.json"), "'no' is not a directory"),
        (("--data", "own.jsonl", "-o", "folder"), "'folder' is a directory"),
        (("--data", "own.jsonl", "-o", "folder", "--overwrite"), "'folder' is a directory"),
        (("--data", "own.jsonl", "-o", "own.jsonl", "--overwrite"), "'own.jsonl' is an input"),
        (
            ("--data", "own.jsonl", "--concurrency", "1", "--baseline", "http://x"),
            "there is no URL to measure",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(options, message, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    if "--concurrency" not in options:
        options = (*options, "--concurrency", "1")
    assert message in run(*options, code=1)


@pytest.mark.parametrize(
    ("kind", "answers", "options", "message"),
    [
        ("vllm", {"speculative": False}, (), "no speculative metrics"),
        ("sglang", {"speculative": False}, (), "--speculative-algorithm DFLASH"),
        ("vllm", {"error": (404, "Not Found")}, (), "the server's root as URL"),
        ("vllm", {"error": (400, "no chat template")}, (), "--chat-template"),
        ("sglang", {"error": (400, "longer than the context length")}, (), "lower --max-tokens"),
        ("vllm", {"error": (401, "Unauthorized")}, (), "DFLASH_BENCH_API_KEY"),
        ("other", {}, (), "names neither vllm nor sglang"),
    ],
)
def test_servers_that_cannot_be_measured(kind, answers, options, message, prompts, output):
    with serving(kind, **answers) as fake:
        if kind == "other":
            fake.server_info = dict
        printed = run(
            fake.url, "--data", prompts, "--concurrency", 1, "-o", output, *options, code=1
        )
    assert message in printed


def test_a_url_may_lack_its_scheme():
    """As those of `top` and `doctor` may."""
    with serving("vllm") as fake:
        assert connect(fake.url.removeprefix("http://")).client.url == fake.url
    with pytest.raises(DFlashError, match="cannot be reached"):
        connect("ftp://somewhere")


def test_an_output_that_cannot_be_written_is_told_before_anything_runs(
    prompts, output, monkeypatch
):
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with serving("vllm", plans=PLANS) as fake:
        printed = run(fake.url, "--data", prompts, "--concurrency", 1, "-o", output, code=1)
        assert not fake.seen
    assert "cannot be written ([Errno 13] Permission denied" in printed


def test_a_server_with_a_key_is_measured_with_it(prompts, output, monkeypatch):
    monkeypatch.setenv("DFLASH_BENCH_API_KEY", "secret")
    with serving("sglang", plans=PLANS, api_key="secret") as fake:
        record = measure(fake, prompts, output)
    assert record.cells[0].tau.pooled == pytest.approx(10 / 3)
    assert "secret" not in output.read_text()


def test_a_server_without_a_drafter_can_be_measured_alone(prompts, output):
    with serving("vllm", speculative=False, plans=PLANS) as fake:
        record = measure(fake, prompts, output, "--no-drafter")
    assert record.cells[0].tokens_per_second > 0
    assert record.cells[0].tau.sources["pooled"].startswith("/metrics has no")


def test_a_damaged_result_is_named(tmp_path):
    for text, message in (("{", "is not a result"), ('{"version": 7}', "has version 7"), (
        '{"version": 1}', "damaged at label")):  # fmt: skip
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(DFlashError, match=message):
            read_record(tmp_path / "r.json")
