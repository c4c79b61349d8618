"""Commands that measure: bench and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dflash_plugin.cli.common import (
    Device,
    Dtype,
    Json,
    Thinking,
    console,
    errors,
    load,
    print_json,
    quiet,
    reports_errors,
    resolve_pair,
)
from dflash_plugin.errors import DFlashError


@reports_errors
def bench(
    url: Annotated[
        str | None,
        typer.Argument(
            help="Root URL of a vLLM or SGLang server; none for the Transformers engine."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL prompts, or gsm8k, math500, humaneval, mbpp, mt_bench; repeatable."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="URL of a server to run in turns; `alone` for the Transformers engine."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Result.")] = Path("bench.json"),
    overwrite: Annotated[bool, typer.Option(help="Replace a result in OUTPUT.")] = False,
    concurrency: Annotated[
        str, typer.Option(help="Requests in flight, with commas between.")
    ] = "1,2,4,8,16,32,64",
    repeats: Annotated[int, typer.Option(help="Timed runs of each cell and server.")] = 3,
    warmup: Annotated[bool, typer.Option(help="Run a round of requests before each cell.")] = True,
    limit: Annotated[int | None, typer.Option(help="Prompts per set.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: int = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Answers of max-tokens tokens.")] = False,
    thinking: Annotated[
        Thinking | None, typer.Option(help="enable_thinking of the chat template.")
    ] = None,
    keep_text: Annotated[
        int, typer.Option(help="Answers per set and server to keep by verify pass.")
    ] = 0,
    drafter_needed: Annotated[
        bool, typer.Option("--drafter-needed/--no-drafter", help="Refuse a server without one.")
    ] = True,
    label: Annotated[str | None, typer.Option(help="What a report calls it.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Name, where the server does not tell.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each server.")] = None,
    server_command: Annotated[
        str | None, typer.Option(help="How the server was started, for the record.")
    ] = None,
    baseline_command: Annotated[
        str | None, typer.Option(help="How the baseline was started, for the record.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="Of the Transformers engine: directory, or smollm2.")
    ] = "smollm2",
    drafter: Annotated[
        Path | None, typer.Option(help="Of the Transformers engine; the shipped one for smollm2.")
    ] = None,
    dtype: Dtype | None = None,
    adaptive: Annotated[
        bool, typer.Option(help="Transformers engine: verify as many drafts as pay.")
    ] = False,
    device: Device = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="DFLASH_BENCH_API_KEY", help="Of the servers.", hidden=True)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure speculative decoding on a running server, or with the Transformers engine."""
    quiet()
    from dflash_plugin.bench.data import load_sets
    from dflash_plugin.bench.output import check_output_file
    from dflash_plugin.bench.schema import Settings
    from dflash_plugin.bench.sweep import begin, check_settings, connect, sweep

    check_output_file(output, [Path(one) for one in data or []], overwrite=overwrite)
    settings = Settings(
        data=data or [],
        limit=limit,
        concurrency=_numbers("--concurrency", concurrency),
        repeats=repeats,
        warmup=warmup,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        ignore_eos=ignore_eos,
        thinking=None if thinking is None else thinking == "on",
    )
    sets = load_sets(settings.data, limit)
    check_settings(settings, sets)
    endpoints: Any = {}
    if url is not None:
        endpoints["measured"] = connect(url, api_key)
        if baseline is not None:
            endpoints["baseline"] = connect(baseline, api_key)
    else:
        endpoints = _embedded(target, drafter, dtype, device, adaptive, baseline, keep_text > 0)
    record = begin(settings, endpoints, label, drafter=drafter_needed)
    commands = {"measured": server_command, "baseline": baseline_command}
    for server in record.servers:
        server.describe_further(gpu, gpus, commands[server.role])
    try:
        with _bench_progress() as progress:
            sweep(record, endpoints, sets, output, keep_text, progress)
    except KeyboardInterrupt:
        _print_kept(record, output)
        raise typer.Exit(130) from None
    except DFlashError:
        _print_kept(record, output)
        raise
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        _print_cells(record)
        errors.print(f"result written to {output}", markup=False, highlight=False)


def _print_kept(record: Any, output: Path) -> None:
    """What is left of a measurement that was stopped."""
    kept = "nothing was finished, and nothing is kept"
    if record.cells:
        finished = sum(repeat.requests for cell in record.cells for repeat in cell.repeats)
        kept = f"{finished} requests of {len(record.cells)} cells are in {output}, marked as "
        kept += "incomplete"
    errors.print(f"stopped: {kept}", markup=False, highlight=False)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise DFlashError(f"{option} is {text!r}: write numbers with commas, like 1,8,64") from None


def _embedded(
    target: str,
    drafter: Path | None,
    dtype: Dtype | None,
    device: str | None,
    adaptive: bool,
    baseline: str | None,
    record_drafts: bool,
) -> dict[str, Any]:
    from dflash_plugin.bench.embedded import EmbeddedEngine

    if baseline not in (None, "alone"):
        raise DFlashError(
            f"--baseline is {baseline!r} and there is no URL to measure: give the server's URL "
            "first, or --baseline alone for the Transformers engine"
        )
    target_directory, directory = resolve_pair(target, drafter)
    model, loaded, tokenizer = load(target_directory, directory, dtype, device, "checkpoint")
    endpoints = {
        "measured": EmbeddedEngine(
            model, tokenizer, loaded, target, adaptive, record_drafts, directory.name
        )
    }
    if baseline is not None:
        endpoints["baseline"] = EmbeddedEngine(model, tokenizer, None, target)
    return endpoints


@contextmanager
def _bench_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar of the requests of the current run; a line a run where there is no terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None)

        def show(what: str, done: int, of: int) -> None:
            if done == 0:
                progress.reset(task, description=what, total=of)
                if not errors.is_terminal:
                    errors.print(what, markup=False, highlight=False)
            progress.update(task, completed=done)

        yield show


def _print_cells(record: Any) -> None:
    def shown(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    heads = ["set", "in flight", "tokens/s", "baseline", "speedup", "τ"]
    # A baseline may draft too, by another method.
    both = any(cell.role == "baseline" and cell.tau.pooled for cell in record.cells)
    heads += ["baseline's τ"] if both else []
    table = Table(*heads, "TTFT", "TPOT ms", "counts")
    for cell in record.cells:
        if cell.role == "baseline":
            continue
        beside = record.cell("baseline", cell.set_name, cell.concurrency)
        agree = {check.agrees for repeat in cell.repeats for check in repeat.checks}
        table.add_row(
            cell.set_name,
            str(cell.concurrency),
            shown(cell.tokens_per_second, 1),
            shown(beside.tokens_per_second if beside else None, 1),
            shown(cell.tokens_per_second / beside.tokens_per_second if beside else None),
            shown(cell.tau.pooled),
            *([shown(beside.tau.pooled if beside else None)] if both else []),
            shown(cell.ttft_ms.p50 if cell.ttft_ms else None, 0),
            shown(cell.tpot_ms.p50 if cell.tpot_ms else None, 1),
            "DIFFER" if False in agree else "agree" if True in agree else "untold",
        )
    console.print(table)


@reports_errors
def report(
    results: Annotated[list[Path], typer.Argument(help="Results of `dflash-plugin bench`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page.")] = Path(
        "report.html"
    ),
    overwrite: Annotated[bool, typer.Option(help="Replace the file OUTPUT.")] = False,
) -> None:
    """Make one self-contained HTML page of measurements."""
    from dflash_plugin.bench.output import check_output_file
    from dflash_plugin.bench.report import page
    from dflash_plugin.bench.schema import read_record

    check_output_file(output, results, overwrite=overwrite)
    text = page([read_record(path) for path in results])
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DFlashError(
            f"{str(output)!r} cannot be written ({error}): give another --output"
        ) from error
    errors.print(f"report written to {output}", markup=False, highlight=False)
