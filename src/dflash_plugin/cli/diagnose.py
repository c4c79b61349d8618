"""Commands that look at a pair or a server: doctor and top."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from dflash_plugin.cli.common import (
    Device,
    DialectOption,
    DraftWeightsOption,
    Dtype,
    Json,
    Thinking,
    console,
    errors,
    print_json,
    quiet,
    reports_errors,
    resolve_pair,
)
from dflash_plugin.errors import DFlashError


def doctor(
    target: Annotated[str, typer.Option(help="Model directory, or smollm2.")] = "smollm2",
    drafter: Annotated[
        Path | None, typer.Option(help="Drafter directory; the shipped one for smollm2.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of a server that runs the pair, to look at as well.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL prompts as the server gets them; built in if left out."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many of them.", min=1)] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.", min=2)] = 64,
    raw: Annotated[bool, typer.Option(help="Prompts are sent without the chat template.")] = False,
    thinking: Annotated[
        Thinking | None, typer.Option(help="enable_thinking of the chat template.")
    ] = None,
    ask: Annotated[
        bool, typer.Option(help="Send the prompts to the server, twice, to compare τ.")
    ] = True,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="What the engine is told.", min=1)
    ] = None,
    dialect: DialectOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="What the engine runs in.")] = None,
    draft_weights: DraftWeightsOption = "checkpoint",
    compare_float32: Annotated[
        bool, typer.Option(help="Load the target a second time, in float32, to compare.")
    ] = True,
    device: Device = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="DFLASH_BENCH_API_KEY", help="Of the server.", hidden=True)
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out why acceptance is low. Exit 0: healthy, 1: a fault, 2: undecided or unchecked."""
    quiet()
    from dflash_plugin.doctor import DoctorOptions

    options = DoctorOptions(
        dialect=dialect,
        num_speculative_tokens=num_speculative_tokens,
        draft_weights=draft_weights,
        raw=raw,
        thinking=None if thinking is None else thinking == "on",
        compare_float32=compare_float32,
    )
    try:
        # A server that cannot be reached ends the command before a minute of drafting.
        inspected = _inspect_server(server, ask, api_key) if server else None
        found = _diagnose(
            target, drafter, inspected, data, prompts, max_new_tokens, dtype, device, options
        )
    except DFlashError as error:
        if as_json:
            print_json({"exit_code": 2, "error": str(error)})
        errors.print(f"could not check: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    if as_json:
        facts = {"verdict": found.verdict, "fix": found.fix, "exit_code": found.exit_code}
        print_json({**found.model_dump(mode="json"), **facts})
    else:
        _print_diagnosis(found)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def _inspect_server(url: str, probe: bool, api_key: str | None) -> Any:
    from dflash_plugin.doctor.probe import ServerProber
    from dflash_plugin.doctor.server import inspect_server
    from dflash_plugin.monitor.client import ServerClient

    client = ServerClient(url, api_key)
    return inspect_server(client, ServerProber(client) if probe else None)


def _diagnose(
    target: str,
    drafter: Path | None,
    server: Any,
    data: Path | None,
    prompts: int,
    max_new_tokens: int,
    dtype: Dtype | None,
    device: str | None,
    options: Any,
) -> Any:
    import torch

    from dflash_plugin.doctor import TargetTexts, diagnose
    from dflash_plugin.doctor.texts import PROMPTS
    from dflash_plugin.prompts import Prompt, load_prompts
    from dflash_plugin.transformers import load_target

    model, directory = resolve_pair(target, drafter)
    questions = (
        load_prompts(data, prompts) if data else [Prompt.user(text) for text in PROMPTS[:prompts]]
    )
    with errors.status("loading") as status:
        loaded, tokenizer = load_target(model, getattr(torch, dtype) if dtype else None, device)
        on = TargetTexts(model, loaded, tokenizer, questions, max_new_tokens)
        return diagnose(on, directory, options, server, _progress(status))


def _progress(status: Any) -> Any:
    """Shows what is being tried: in place on a terminal, else a line for each check."""
    if errors.is_terminal:
        return status.update
    told: list[str] = []

    def tell(what: str) -> None:
        check = what.partition(":")[0]
        if check not in told:
            told.append(check)
            errors.print(check, markup=False, highlight=False)

    return tell


def _print_diagnosis(found: Any) -> None:
    styles = {
        "ok": "green", "note": "yellow", "fault": "red", "undecided": "yellow",
        "unchecked": "yellow",
    }  # fmt: skip
    table = Table("check", "", "finding", title=f"{found.drafter} on {found.target}")
    for check in found.checks:
        shown = [check.finding, f"looked at {check.looked_at}"]
        if check.evidence and check.status != "ok":
            shown.append(f"evidence: {json.dumps(check.evidence, ensure_ascii=False)}")
        shown += [f"fix: {check.fix}"] if check.fix and check.status != "ok" else []
        style = styles[check.status]
        text = Text(shown[0]).append("\n" + "\n".join(shown[1:]), style="dim")
        table.add_row(check.name, Text(check.status, style=style), text)
    console.print(table)
    style = styles["fault" if found.faults else "ok" if found.exit_code == 0 else "unchecked"]
    console.print(Text(found.verdict, style=style), soft_wrap=True)
    if found.fix:
        console.print(Text(f"fix: {found.fix}"), soft_wrap=True)


@reports_errors
def top(
    server: Annotated[str, typer.Option(help="URL of a vLLM or SGLang server.")],
    interval: Annotated[float, typer.Option(help="Seconds between scrapes.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option(help="Print one frame after two scrapes, and end.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="DFLASH_BENCH_API_KEY", help="Of the server.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch a server's speculation: requests, tokens/s, τ and acceptance by position.

    On a terminal the view is live. Elsewhere there is one line an interval, or one JSON object with
    --json, until the server cannot be reached or the command is interrupted.
    """
    import time

    from dflash_plugin.monitor.client import ServerClient
    from dflash_plugin.monitor.top import scrape, watch

    client = ServerClient(server, api_key)
    if console.is_terminal and not (once or as_json):
        watch(client, interval)
        return
    try:
        for view in scrape(client, interval):
            if as_json:
                sys.stdout.write(json.dumps(view.as_json(), indent=1 if once else None) + "\n")
            elif once:
                console.print(view, width=None if console.is_terminal else 100)
            else:
                sys.stdout.write(f"{time.strftime('%H:%M:%S')} {view.line()}\n")
            sys.stdout.flush()
            if once:
                return
    except KeyboardInterrupt:
        return
