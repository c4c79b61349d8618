"""Bench, doctor and top against a running server of either engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dflash_plugin.bench.schema import Record, read_record
from dflash_plugin.checkpoints.hub import resolve_drafter
from dflash_plugin.checkpoints.io import load_config
from dflash_plugin.cli.main import app
from dflash_plugin.doctor.probe import Probe, Question, ServerProber
from dflash_plugin.doctor.server import check_server, inspect_server
from dflash_plugin.doctor.server_setup import check_setup
from dflash_plugin.monitor.client import ServerClient
from tests.helpers.http_server import HttpServer

DATA = Path(__file__).parents[1] / "data"
DRAFTS = 7


def bench(server: HttpServer, output: Path, prompts: int, tokens: int) -> Record:
    """Two sets, one of two turns, one by one and all prompts of a set at once."""
    sets = [
        part for name in ("gsm8k_test", "mt_bench") for part in ("--data", DATA / f"{name}.jsonl")
    ]
    arguments = ["bench", server.client.base_url, *sets, "--limit", prompts, "--keep-text", 1]
    arguments += ["--concurrency", f"1,{prompts}", "--repeats", 1, "--max-tokens", tokens]
    done = CliRunner().invoke(app, [*map(str, arguments), "--output", str(output)])
    assert done.exit_code == 0, done.output
    record = read_record(output)
    assert len(record.cells) == 4
    for cell in record.cells:
        assert cell.tau.pooled > 1.3
        assert len(cell.acceptance.unconditional) == DRAFTS
        assert cell.tau.pooled <= 1 + sum(cell.acceptance.unconditional) + 1e-9
    return record


def check_kept_text(record: Record, reference: dict[str, Any]) -> None:
    """The first answer, put together from its passes, is the core's."""
    kept = record.texts[0]
    assert kept.exact
    ids = reference["results"][0].tokens
    text = "".join([*kept.first, *(t for p in kept.passes for t in (*p.accepted, p.bonus))])
    assert text == reference["tokenizer"].decode(ids)


def check_doctor_and_top(
    server: HttpServer,
    reference: dict[str, Any],
    count: int,
    passes: str,
    accepted: str,
    metrics: Callable[[], dict[str, float]],
) -> tuple[Probe, str]:
    """Doctor's part of a server finds it healthy: the same texts, the same passes; top agrees.

    Nothing of how the server runs the drafter is left unknown.

    Args:
        server: of the shipped drafter.
        reference: what the core writes, by ``prompts`` and ``results``.
        count: of the last prompts, to be asked.
        passes, accepted: counters of verify passes, and of accepted drafts by position.
        metrics: gives the server's counters.

    Returns:
        What came of asking, and what doctor says of the server.
    """
    results = reference["results"][-count:]
    questions = [
        Question(prompt, result.tokens)
        for prompt, result in zip(reference["prompts"][-count:], results, strict=True)
    ]
    committed = [tokens for result in results for tokens in result.committed]
    reference_tau = sum(committed) / len(committed)
    client = ServerClient(str(server.client.base_url))
    inspected = inspect_server(client, ServerProber(client))
    before = metrics()
    probe = inspected.probe(questions, lambda: reference_tau)
    after = metrics()
    assert probe.first.tau == pytest.approx(reference_tau)
    assert probe.repeated.tau == pytest.approx(reference_tau)
    assert (probe.first.agreement, probe.first.hit_rate) == (1.0, 0.0)
    assert probe.repeated.hit_rate > 0.3
    assert probe.first.passes == len(committed)
    assert after[passes] - before[passes] == 2 * len(committed)
    checks = {each.name: each for each in check_server(inspected, reference_tau, 3.31, probe)}
    assert not [each for each in checks.values() if each.status in ("fault", "unchecked")]
    setup = {
        each.name: each.finding
        for each in check_setup(inspected.again(), load_config(resolve_drafter(None, "smollm2")))
    }
    assert not [name for name, said in setup.items() if said.startswith("unknown")], setup
    assert setup["server layout"] == "read as z-lab, block size 8"
    assert setup["draft pass"].startswith("eager")
    counted = checks["served acceptance"].evidence
    assert counted["passes"] == before[passes]
    stood, more = (
        sum(found[f"{accepted}[{k}]"] for k in range(DRAFTS)) for found in (before, after)
    )
    if before[passes]:
        assert counted["tau_served"] == pytest.approx(1 + stood / before[passes], abs=1e-3)
    top = ["top", "--server", str(server.client.base_url), "--interval", "0.1", "--once"]
    shown = CliRunner().invoke(app, top)
    assert shown.exit_code == 0, shown.output
    assert f"{1 + more / after[passes]:.2f}, 3.31 expected" in shown.output
    return probe, checks["server"].finding
