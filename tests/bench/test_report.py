"""``dflash-plugin report``: the page as a browser would take it apart."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from dflash_plugin.bench.metrics import AVERAGES
from dflash_plugin.bench.report import device_of, drafter_of, page
from dflash_plugin.bench.schema import (
    Cell,
    CountCheck,
    KeptPass,
    KeptText,
    Percentiles,
    PositionRates,
    Record,
    Repeat,
    Server,
    Settings,
    Tau,
)
from dflash_plugin.charts import Line, line_chart
from dflash_plugin.cli.main import app
from dflash_plugin.decoding.acceptance import conditional_rates
from dflash_plugin.errors import DFlashError

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"
VOID = {"meta"}


class Parsed(HTMLParser):
    """Elements, their attributes and the text of a page whose tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.spans: dict[str, list[str]] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span":
            self.spans.setdefault(dict(attributes).get("class") or "", []).append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "span":
            style = self.elements[-1][1].get("class") or ""
            self.spans[style][-1] += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def cell(role: str, level: int, speed: float, **fields) -> Cell:
    shares = [0.81, 0.6, 0.3]
    checks = [CountCheck(what="tokens", client=100, server=100, agrees=True, note="counter")]
    known = {
        "tau": Tau(pooled=2.71, mean_per_request=2.83, token_weighted=2.97, sources={}),
        "acceptance": PositionRates(
            unconditional=shares, conditional=conditional_rates(shares), source="counter"
        ),
        "repeats": [
            Repeat(
                seconds=1, requests=4, tokens=100, tokens_per_second=speed, client_busy=0.1,
                checks=checks,
            )
        ],
        "set_name": "gsm8k",
    }  # fmt: skip
    return Cell(
        role=role,
        concurrency=level,
        tokens_per_second=speed,
        per_user=speed / level,
        ttft_ms=Percentiles(p50=11.5, p90=12.5, p99=13.5),
        tpot_ms=Percentiles(p50=1.5, p90=2.5, p99=3.5),
        passes=37,
        **{**known, **fields},
    )


def record(label: str = "ours", **fields) -> Record:
    servers = [
        Server(role=role, engine="vllm", version="0.32.0", model="org/m", speculative=True, gpus=2)
        for role in ("measured", "baseline")
    ]
    known = {
        "cells": [
            cell("measured", 1, 300.0),
            cell("baseline", 1, 200.0),
            cell("measured", 8, 1234.0),
            cell("baseline", 8, 1000.0),
        ],
        "complete": True,
        "servers": servers,
    }
    return Record(
        label=label,
        created="2026-01-02T03:04:05+00:00",
        command="dflash-plugin bench x",
        plugin_version="0.1.0",
        git_commit="abc",
        client="c",
        settings=Settings(data=["gsm8k"], concurrency=[1, 8]),
        **{**known, **fields},
    )


def answer(**fields) -> KeptText:
    passes = [
        KeptPass(accepted=["one", "two"], bonus="three", rejected=["four"]),
        KeptPass(accepted=[], bonus=None, rejected=None),
    ]
    known = {
        "prompt": "why?", "first": ["zero"], "passes": passes, "prompt_id": "gsm8k-1", "note": "n"
    }  # fmt: skip
    return KeptText(
        role="measured", set_name="gsm8k", turn=0, concurrency=1, exact=True,
        **{**known, **fields},
    )  # fmt: skip


def test_numbers_are_on_the_page():
    parsed = Parsed(page([record()]))
    text = " ".join(parsed.text.split())
    # speedups, τ by three averages, first draft, tokens/s and per GPU, percentiles
    for number in (
        "1.50× and 1.23×", "2.71", "2.83", "2.97", "81%", "1,234.0", "617.0",
        "11.5 / 12.5 / 13.5", "1.5 / 2.5 / 3.5",
    ):  # fmt: skip
        assert number in text, number
    assert "agree" in text
    points = [a["points"] for tag, a in parsed.elements if tag == "polyline"]
    # speedup, two servers' users against the GPU, acceptance and conditional acceptance
    assert len(points) == 5


def cards(text: str) -> dict[str, str]:
    """Numbers of the cards by their heads."""
    pattern = r'<div class="card"><h3>(.*?)</h3><div class="number">(.*?)</div>'
    return dict(re.findall(pattern, text))


def test_cards_are_headed_by_what_they_show():
    assert cards(page([record()])) == {
        "Speedup, 1 and 8 in flight": "1.50× and 1.23×",
        "Acceptance length, 1 in flight": "τ 2.71",
        "First draft accepted, 1 in flight": "81%",
        "One reader, 1 in flight": "300.0 tokens/s",
        "All readers, 8 in flight": "1,234.0 tokens/s",
    }


def test_the_speedup_card_tells_the_range():
    """The best and the worst concurrency are neither the smallest nor the largest."""
    speeds = {1: (300.0, 200.0), 2: (900.0, 300.0), 4: (600.0, 500.0), 8: (1300.0, 1000.0)}
    cells = [
        cell(role, level, speed)
        for level, pair in speeds.items()
        for role, speed in zip(("measured", "baseline"), pair, strict=True)
    ]
    text = page([record(cells=cells)])
    assert cards(text)["Speedup, 1 and 8 in flight"] == "1.50× and 1.30×"
    assert "Over 4 concurrencies it is 1.20× (4 in flight) to 3.00× (2 in flight)." in text
    alone = cards(page([record(cells=cells[:2])]))
    assert alone["Speedup, 1 in flight"] == "1.50×"
    assert not [head for head in cards(page([record(cells=cells[:1])])) if "Speedup" in head]


def test_a_baseline_that_was_interrupted_gives_no_speedup():
    """It answered another choice of prompts than the measured server."""
    repeat = Repeat(
        seconds=1, requests=1, tokens=9, tokens_per_second=9, client_busy=None, checks=[]
    )
    cells = [cell("measured", 1, 300.0), cell("baseline", 1, 200.0, repeats=[repeat])]
    text = page([record(cells=cells, complete=False)])
    assert not [head for head in cards(text) if "Speedup" in head]
    assert "×</td>" not in text


def test_rates_tell_how_many_passes_are_behind_them():
    """Of 37 passes, 0.81 accepted the first draft and 0.6 the second."""
    text = page([record()])
    assert "gsm8k, n = 37 passes" in text
    assert "gsm8k, n = 37 to 22 passes" in text
    tips = [tip for tip in re.findall(r"<title>(.*?)</title>", text) if ", n = " in tip]
    assert [tip.rsplit(", ", 1)[1] for tip in tips[3:]] == ["n = 37", "n = 30", "n = 22"]


def server(**fields) -> Server:
    known = {"role": "measured", "engine": "vllm", "model": "org/m", "speculative": True}
    return Server(**{**known, **fields})


@pytest.mark.parametrize(
    ("flags", "drafter"),
    [
        (None, None),
        ({"dtype": "float32"}, None),
        ({"drafter": "smollm2"}, "smollm2"),
        ({"speculative_draft_model_path": "/models/d"}, "/models/d"),
        ({"speculative_config": {"model": "org/d"}}, "org/d"),
        ("vllm serve m --speculative-model org/d --port 1", "org/d"),
        ("sglang --speculative-draft-model-path=/models/d", "/models/d"),
        ('vllm serve m --speculative-config \'{"method": "dflash", "model": "d"}\'', "d"),
        ("vllm serve m", None),
    ],
)
def test_the_drafter_is_named(flags, drafter):
    one = server(flags=flags)
    assert drafter_of(one) == drafter
    text = " ".join(Parsed(page([record(servers=[one])])).text.split())
    name = drafter.rsplit("/", 1)[-1] if drafter else "(name untold)"
    assert f"m with drafter {name} on" in text
    assert ("give --server-command" in text) == (drafter is None)


@pytest.mark.parametrize(
    ("fields", "device"),
    [
        ({"gpu": "NVIDIA H200"}, "GPU"),
        ({"gpu": "AMD EPYC 7B13, 2 cores", "engine": "transformers"}, "CPU"),
        ({"gpu": None, "engine": "sglang", "flags": {"device": "cpu"}}, "CPU"),
        ({"gpu": None}, "device"),
    ],
)
def test_a_cpu_is_no_gpu(fields, device):
    one = server(**fields)
    assert device_of(one) == device
    text = page([record(servers=[one])])
    assert f"One reader against the whole {device}" in text
    assert f"on one {device}." in text
    assert ("GPU" in re.sub("GPUs, or other devices", "", text)) == (device == "GPU")


def test_nothing_is_loaded_from_elsewhere_or_run():
    text = page([record(texts=[answer()])])
    parsed = Parsed(text)
    assert not parsed.tags() & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes in parsed.elements:
        assert not {"src", "href", "xlink:href", "style"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "http://" not in text
    assert "https://" not in text


def test_hostile_text_stays_text():
    texts = [
        answer(
            prompt=HOSTILE,
            prompt_id=HOSTILE,
            first=[HOSTILE],
            passes=[KeptPass(accepted=[HOSTILE], bonus=HOSTILE, rejected=[HOSTILE])],
            note=HOSTILE,
        )
    ]
    server = Server(
        role="measured", engine="vllm", version=HOSTILE, model=HOSTILE, speculative=True,
        gpu=HOSTILE, flags={HOSTILE: HOSTILE}, notes=[HOSTILE],
    )  # fmt: skip
    missing = Tau(sources=dict.fromkeys(AVERAGES, HOSTILE))
    cells = [cell("measured", 1, 5.0, set_name=HOSTILE, tau=missing)]
    parsed = Parsed(page([record(HOSTILE, texts=texts, servers=[server], cells=cells)]))
    assert not parsed.tags() & {"script", "img"}
    assert parsed.spans["a"][-1] == parsed.spans["b"][-1] == parsed.spans["r"][-1] == HOSTILE
    assert parsed.text.count(HOSTILE) > 10


def test_the_viewer_tells_tokens_apart():
    parsed = Parsed(page([record(texts=[answer()])]))
    # The first of each is the key's.
    assert parsed.spans["a"][1:] == ["one", "two"]
    assert parsed.spans["b"][1:] == ["three"]
    assert parsed.spans["r"][1:] == ["four"]
    titles = [a["title"] for tag, a in parsed.elements if a.get("class") == "pass"]
    assert titles == ["pass 1: 2 accepted, 1 rejected", "pass 2: 0 accepted"]
    assert "3 tokens in 2 passes, τ 1.50" in parsed.text


def test_several_runs_stand_side_by_side():
    parsed = Parsed(page([record(), record(), record("theirs")]))
    for label in ("ours (2)", "theirs, baseline"):
        assert label in parsed.text
    lines = [a["class"] for tag, a in parsed.elements if tag == "polyline"]
    assert {"s0", "s1", "s2", "s2 dashed"} <= set(lines)


def test_what_is_doubtful_is_said():
    wrong = [CountCheck(what="tokens", client=1, server=2, agrees=False, note="c")]
    repeat = Repeat(
        seconds=1, requests=1, tokens=1, tokens_per_second=1, client_busy=0.95, checks=wrong
    )
    why = Tau(pooled=2.0, sources=dict.fromkeys(AVERAGES, "chunks are not passes"))
    cells = [cell("measured", 4, 5.0, repeats=[repeat], tau=why)]
    parsed = Parsed(page([record(complete=False, cells=cells)]))
    for text in (
        "ours was stopped before its end",
        "the server counted otherwise than the client in gsm8k ×4 (measured)",
        "the client was busy for 95%",
        "No τ mean: chunks are not passes.",
        "A speedup needs a baseline",
    ):
        assert text in parsed.text, text


def test_a_page_of_many_answers_is_small():
    passes = [KeptPass(accepted=[" word"] * 3, bonus=" next", rejected=[" no"] * 4)] * 64
    text = page([record(texts=[answer(passes=passes)] * 20)])
    assert len(text.encode()) < 1_000_000


def test_chart_places_points_by_their_values():
    chart = line_chart([Line("a", [(1, 0.0), (2, 1.0), (4, 2.0)], 0)], "x", "y", powers=True)
    points = re.search(r'points="([^"]+)"', chart)[1]
    (x1, y1), (x2, y2), (x3, y3) = (map(float, p.split(",")) for p in points.split())
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.11)
    assert x1 < x2
    assert y1 > y2


def test_command(tmp_path):
    (tmp_path / "a.json").write_text(record().model_dump_json())
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "a.json"), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert Parsed(out.read_text(encoding="utf-8")).text
    result = CliRunner().invoke(app, ["report", str(tmp_path / "no.json")])
    assert result.exit_code == 1
    assert "no.json" in result.output


def test_nothing_is_replaced_unasked(tmp_path):
    result, other = tmp_path / "a.json", tmp_path / "page.html"
    result.write_text(record().model_dump_json())
    other.write_text("mine")
    link = tmp_path / "link.html"
    link.symlink_to(result)

    def report(output, *options) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["report", str(result), "-o", str(output), *options])
        return done.exit_code, " ".join(done.output.split())

    for output in (result, link):
        for options in ((), ("--overwrite",)):
            code, printed = report(output, *options)
            assert code == 1
            assert "is an input as well" in printed
    code, printed = report(other)
    assert code == 1
    assert "is already there: give another --output, or --overwrite" in printed
    assert other.read_text() == "mine"
    assert result.read_text() == record().model_dump_json()
    assert report(other, "--overwrite")[0] == 0
    assert "Speculative decoding" in other.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.html", "page.html"]


def test_a_result_without_cells_is_refused():
    with pytest.raises(DFlashError, match="hold no cell"):
        page([record(cells=[])])
