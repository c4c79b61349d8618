"""The command line: fetch, inspect, doctor, convert, train, generate, eval, bench, report, top."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dflash_plugin.errors import DFlashError

if TYPE_CHECKING:
    from dflash_plugin.drafter.config import Dialect

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DFlash speculative decoding: make, check and run drafters.",
)
errors = Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the first GPU by default.")]


class Dtype(str, Enum):
    """Weights of the target and drafter."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(str, Enum):
    """What the draft pass multiplies by."""

    checkpoint = "checkpoint"
    fp8 = "fp8"


DraftWeightsOption = Annotated[
    Weights, typer.Option(help="fp8 rounds the drafter's linears and its head's copy to FP8.")
]


class DialectName(str, Enum):
    """Checkpoint dialects."""

    z_lab = "z-lab"
    speculators = "speculators"
    specforge = "specforge"
    modelopt = "modelopt"


class Thinking(str, Enum):
    """``enable_thinking`` of a chat template."""

    on = "on"
    off = "off"


DialectOption = Annotated[
    DialectName | None, typer.Option(help="Dialect to read, where the file does not say enough.")
]


class Weighting(str, Enum):
    """Weights of a block's positions in the loss."""

    exponential = "exponential"
    dpace = "dpace"


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print a ``DFlashError`` as one message and exit with 1."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DFlashError as error:
            errors.print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from None

    return wrapped


def print_json(value: Any) -> None:
    """Write a value to standard output as JSON."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _quiet() -> None:
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*capture_outputs.*")


@app.command()
@reports_errors
def train(
    target: Annotated[str, typer.Option(help="Model directory, or smollm2.")],
    output: Annotated[
        Path, typer.Option(help="Where the drafter goes; work files in OUTPUT/work.")
    ],
    mask_token: Annotated[
        int | None,
        typer.Option(help="Token id that the target never writes; stands for 'to be drafted'."),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Drafter checkpoint to go on from; it decides mask token, block size, layers, "
            "window and features."
        ),
    ] = None,
    dflash2: Annotated[
        bool, typer.Option("--dflash2", help="Add convolutions and selector.")
    ] = False,
    selector_rank: Annotated[int | None, typer.Option(help="256 by default.")] = None,
    selector_top_k: Annotated[
        int | None, typer.Option(help="Candidates per position; 16 by default.")
    ] = None,
    selector_weight: Annotated[
        float | None, typer.Option(help="Of the selector's loss beside the head's; 1 by default.")
    ] = None,
    conv_kernel_size: Annotated[int | None, typer.Option(help="Taps; 2 by default.")] = None,
    conv_group_size: Annotated[
        int | None, typer.Option(help="Channels per dynamic coefficient; 16 by default.")
    ] = None,
    prompts: Annotated[list[Path] | None, typer.Option(help="JSONL prompts; repeatable.")] = None,
    self_prompts: Annotated[int, typer.Option(help="User turns the target writes itself.")] = 0,
    openings: Annotated[
        Path | None, typer.Option(help="JSONL of how self-written turns begin.")
    ] = None,
    max_prompt_tokens: int = 256,
    max_new_tokens: int = 256,
    temperature: Annotated[float, typer.Option(help="Of the responses; 0 is greedy.")] = 0.0,
    samples: Annotated[int, typer.Option(help="Responses per prompt.")] = 1,
    held_out: Annotated[int, typer.Option(help="Sequences kept for measuring.")] = 128,
    generation_batch: Annotated[int, typer.Option(help="Requests that generate at once.")] = 8,
    cache_features: Annotated[bool, typer.Option(help="Keep features in shards.")] = False,
    block_size: Annotated[int | None, typer.Option(help="8 by default.")] = None,
    layers: Annotated[int | None, typer.Option(help="3 by default.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="The target's by default.")] = None,
    target_layers: Annotated[
        str | None, typer.Option(help="Comma-separated layer ids; evenly spread by default.")
    ] = None,
    features: Annotated[
        int | None, typer.Option(help="How many layers to read; 5 by default.")
    ] = None,
    sliding_window: int | None = None,
    steps: int = 2000,
    batch_size: Annotated[int, typer.Option(help="Sequences per step and process.")] = 32,
    anchors: Annotated[int, typer.Option(help="Anchors per sequence.")] = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.04,
    clip: float = 1.0,
    weighting: Weighting = Weighting.exponential,
    gamma: float | None = None,
    dpace_alpha: float = 0.5,
    seed: int = 0,
    eval_every: int = 500,
    save_every: int = 500,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a drafter on what the target itself writes. Goes on where it was interrupted."""
    _quiet()
    from dflash_plugin.checkpoints.hub import resolve_model
    from dflash_plugin.train import pipeline
    from dflash_plugin.train.data import DEFAULT_OPENINGS, load_openings
    from dflash_plugin.train.export import export_drafter, save_facts
    from dflash_plugin.train.trainer import TrainConfig

    config = _validated(
        TrainConfig,
        start_from=start_from,
        dflash2=dflash2,
        conv_kernel_size=conv_kernel_size,
        conv_group_size=conv_group_size,
        selector_rank=selector_rank,
        selector_top_k=selector_top_k,
        selector_weight=selector_weight,
        block_size=block_size,
        num_layers=layers,
        intermediate_size=intermediate_size,
        target_layer_ids=_layer_ids(target_layers),
        num_features=features,
        mask_token_id=mask_token,
        sliding_window=sliding_window,
        steps=steps,
        batch_size=batch_size,
        anchors=anchors,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        weighting=weighting.value,
        gamma=gamma,
        dpace_alpha=dpace_alpha,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
    )
    data = _validated(
        pipeline.DataConfig,
        prompts=tuple(prompts or ()),
        self_prompts=self_prompts,
        openings=load_openings(openings) if openings else DEFAULT_OPENINGS,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        held_out=held_out,
        batch=generation_batch,
        cache_features=cache_features,
    )
    directory = resolve_model(target)
    with pipeline.distributed(), _training_progress(steps) as (status, report):
        trainer, facts = pipeline.train(directory, output, config, data, device, status, report)
        if trainer.rank == 0:
            save_facts(output / "work" / "training.json", facts, trainer.history)
            export_drafter(trainer.drafter, directory, output, facts, _command(facts), device)
            if as_json:
                print_json({"output": str(output), **facts})
            else:
                errors.print(f"drafter written to {output}", markup=False)


def _command(facts: dict[str, Any]) -> str:
    """The command line as a user would type it again."""
    processes = facts["processes"]
    program = (
        "dflash-plugin"
        if processes == 1
        else f"torchrun --nproc-per-node {processes} -m dflash_plugin.cli.main"
    )
    return f"{program} {shlex.join(sys.argv[1:])}"


def _layer_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DFlashError(
            f"--target-layers is {text!r}: write layer ids with commas between, like 1,9,17,25"
        ) from None


def _validated(model: Any, **values: Any) -> Any:
    """Build a pydantic model of the options given, turning its complaint into one line."""
    from pydantic import ValidationError

    try:
        return model(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-")
        raise DFlashError(f"{name} is {first['input']!r}: {first['msg']}") from None


@contextmanager
def _training_progress(steps: int) -> Iterator[tuple[Any, Any]]:
    """Progress bars for data and steps; plain lines now and then where there is no terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=errors,
    ) as progress:
        tasks: dict[str, Any] = {}

        def status(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of, note="")
            progress.update(tasks[what], completed=done, total=of)
            if not errors.is_terminal:
                errors.print(f"{what} {done}/{of}")

        def report(record: dict[str, float]) -> None:
            note = f"loss {record['loss']:.3f} τ {record['tau']:.2f}"
            if "held_out_tau" in record:
                note += f" held-out τ {record['held_out_tau']:.2f}"
            if "training" not in tasks:
                tasks["training"] = progress.add_task("training", total=steps, note="")
            progress.update(tasks["training"], completed=record["step"], note=note)
            if not errors.is_terminal and ("held_out_tau" in record or record["step"] % 100 == 0):
                errors.print(f"step {record['step']}/{steps} {note} {record['seconds']:.0f} s")

        yield status, report


@app.command()
@reports_errors
def fetch(
    name: Annotated[str, typer.Argument(help="Model to fetch: smollm2.")],
    output: Annotated[Path | None, typer.Option(help="Directory; the cache by default.")] = None,
    as_json: Json = False,
) -> None:
    """Download a target and make its model directory, with tokenizer and chat template."""
    _quiet()
    from dflash_plugin.checkpoints.hub import fetch_model

    directory = fetch_model(name, output)
    if as_json:
        print_json({"name": name, "directory": str(directory)})
    else:
        Console().print(str(directory), markup=False, highlight=False, soft_wrap=True)


@app.command()
@reports_errors
def inspect(
    directory: Annotated[Path, typer.Argument(help="Drafter checkpoint.")],
    target: Annotated[str | None, typer.Option(help="Its target, or smollm2.")] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="What the engine will be told.")
    ] = None,
    dialect: DialectOption = None,
    replay: Annotated[
        bool, typer.Option(help="Run the known answers on the target in float32.")
    ] = False,
    record: Annotated[
        bool, typer.Option(help="Write what the float32 core drafts beside a checkpoint.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what a checkpoint is and every mismatch with its target; exit 1 on an error."""
    _quiet()
    from dflash_plugin.checkpoints.hub import resolve_model
    from dflash_plugin.checkpoints.inspection import inspect_checkpoint

    model = resolve_model(target) if target else None
    name: Dialect | None = dialect.value if dialect else None
    report = inspect_checkpoint(directory, model, num_speculative_tokens, name)
    if record:
        _record(directory, model, report.fits, name)
    if replay:
        _replay(directory, model, report.fits, name)
    if as_json:
        print_json({**report.model_dump(mode="json"), "fits": report.fits, "replayed": replay})
    else:
        _print_report(report, replay)
    if not report.fits:
        raise typer.Exit(1)


def _record(directory: Path, target: Path | None, fits: bool, dialect: Dialect | None) -> None:
    import torch

    from dflash_plugin.checkpoints.reference_drafts import FILE_NAME
    from dflash_plugin.train.export import record_known_answers
    from dflash_plugin.transformers import load_target

    if target is None or not fits:
        raise DFlashError("--record needs --target and a report without errors")
    if (directory / FILE_NAME).exists():
        raise DFlashError(
            f"{str(directory / FILE_NAME)!r} is already there: check it with --replay, or move it "
            "away to record another"
        )
    record_known_answers(directory, *load_target(target, torch.float32), dialect=dialect)


def _replay(directory: Path, target: Path | None, fits: bool, dialect: Dialect | None) -> None:
    import torch

    from dflash_plugin.checkpoints.reference_drafts import load_record
    from dflash_plugin.checkpoints.reference_drafts import replay as replay_record
    from dflash_plugin.transformers import load_drafter, load_target

    record = load_record(directory)
    if target is None or record is None or not fits:
        raise DFlashError(
            "--replay needs --target, a known_answer.json beside the drafter, and a report without "
            "errors"
        )
    model, _ = load_target(target, torch.float32)
    replay_record(load_drafter(directory, model, dialect=dialect), model, record)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _print_report(report: Any, replayed: bool) -> None:
    console, config = Console(), report.config
    table = Table("field", "value", title=report.directory)
    for name, value in config.model_dump(exclude={"layers", "rope"}).items():
        if value is not None:
            table.add_row(name, _listed(value) if isinstance(value, dict) else str(value))
    for index, layer in enumerate(config.layers):
        window = f"window {layer.sliding_window}" if layer.sliding_window else "full"
        table.add_row(f"layer {index}", f"{window}, {'causal' if layer.causal else 'not causal'}")
    table.add_row("rope", _listed(config.rope.model_dump()))
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row("speculative tokens", str(report.num_draft_tokens))
    answers = f"{report.known_answers}" + (" (replayed: all equal)" if replayed else "")
    table.add_row("known answers", answers)
    console.print(table)
    styles = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in report.findings:
        console.print(
            f"{finding.level}: {finding.subject}: {finding.message}",
            style=styles[finding.level],
            markup=False,
        )
    if not report.findings:
        console.print("nothing to remark")


@app.command()
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
    prompts: Annotated[int, typer.Option(help="How many of them.", min=1)] = 6,
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
    draft_weights: DraftWeightsOption = Weights.checkpoint,
    compare_float32: Annotated[
        bool, typer.Option(help="Load the target a second time, in float32, to compare.")
    ] = True,
    device: Device = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="DFLASH_BENCH_API_KEY", help="Of the server.", hidden=True)
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out why acceptance is low. Exit 0: healthy, 1: a fault, 2: could not check."""
    _quiet()
    from dflash_plugin.doctor import DoctorOptions

    asked = DoctorOptions(
        dialect=dialect.value if dialect else None,
        num_speculative_tokens=num_speculative_tokens,
        draft_weights=draft_weights.value,
        raw=raw,
        thinking=None if thinking is None else thinking is Thinking.on,
        compare_float32=compare_float32,
    )
    try:
        # A server that does not answer is found out before a minute of drafting.
        served = _served(server, ask, api_key) if server else None
        found = _diagnose(
            target, drafter, served, data, prompts, max_new_tokens, dtype, device, asked
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


def _served(server: str, ask: bool, api_key: str | None) -> Any:
    from dflash_plugin.doctor.probe import ServerProber
    from dflash_plugin.doctor.server import ask as look
    from dflash_plugin.monitor.client import ServerClient

    client = ServerClient(server)
    return look(client, ServerProber(client, api_key) if ask else None)


def _diagnose(
    target: str,
    drafter: Path | None,
    served: Any,
    data: Path | None,
    prompts: int,
    max_new_tokens: int,
    dtype: Dtype | None,
    device: str | None,
    asked: Any,
) -> Any:
    import torch

    from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
    from dflash_plugin.doctor import TargetTexts, diagnose
    from dflash_plugin.doctor.texts import PROMPTS
    from dflash_plugin.prompts import Prompt, load_prompts
    from dflash_plugin.transformers import load_target

    directory = resolve_drafter(drafter, target)
    if not directory.is_dir():
        raise DFlashError(f"{str(directory)!r} is not a directory: give --drafter DIR")
    model = resolve_model(target)
    questions = (
        load_prompts(data, prompts) if data else [Prompt.user(text) for text in PROMPTS[:prompts]]
    )
    with errors.status("loading") as status:
        loaded, tokenizer = load_target(
            model, getattr(torch, dtype.value) if dtype else None, device
        )
        on = TargetTexts(model, loaded, tokenizer, questions, max_new_tokens)
        return diagnose(on, directory, asked, served, status.update)


def _print_diagnosis(found: Any) -> None:
    console = Console()
    styles = {"ok": "green", "note": "yellow", "fault": "red", "unchecked": "yellow"}
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


@app.command()
@reports_errors
def top(
    server: Annotated[str, typer.Option(help="URL of a vLLM or SGLang server.")],
    interval: Annotated[float, typer.Option(help="Seconds between scrapes.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option(help="Print one frame after two scrapes, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a server's speculation: requests, tokens/s, τ and acceptance by position."""
    from dataclasses import asdict

    from dflash_plugin.monitor.client import ServerClient
    from dflash_plugin.monitor.top import watch

    view = watch(ServerClient(server), interval, once or as_json)
    if as_json:
        assert view.reading is not None
        assert view.rates is not None
        print_json({"now": asdict(view.reading), "since_last": asdict(view.rates)})
    elif once:
        Console().print(view)


@app.command()
@reports_errors
def convert(
    source: Annotated[Path, typer.Argument(help="Drafter checkpoint of any dialect.")],
    output: Annotated[Path, typer.Argument(help="New directory.")],
    to: Annotated[DialectName, typer.Option(help="Dialect to write.")],
    dialect: DialectOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint in OUTPUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of one dialect as another."""
    _quiet()
    from dflash_plugin.checkpoints.convert import convert as convert_checkpoint

    config = convert_checkpoint(
        source, output, to.value, dialect.value if dialect else None, overwrite
    )
    if as_json:
        print_json({"output": str(output), "config": config.model_dump(mode="json")})
    else:
        errors.print(f"{to.value} checkpoint written to {output}", markup=False)


@app.command()
@reports_errors
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    target: Annotated[str, typer.Option(help="Model directory, or smollm2.")] = "smollm2",
    drafter: Annotated[
        Path | None, typer.Option(help="Drafter directory; the shipped one for smollm2.")
    ] = None,
    max_new_tokens: int = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    compare: Annotated[bool, typer.Option(help="Also run the target alone.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs that --compare times.")] = 3,
    raw: Annotated[bool, typer.Option(help="Leave the chat template out.")] = False,
    dtype: Dtype | None = None,
    draft_weights: DraftWeightsOption = Weights.checkpoint,
    adaptive: Annotated[
        bool, typer.Option(help="Verify as many drafts as pay, none where none does.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt; with --compare, show that the text is the target's own, and both speeds."""
    _quiet()
    from dflash_plugin.bench.evaluate import compare_runs, machine
    from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
    from dflash_plugin.prompts import Prompt, encode
    from dflash_plugin.transformers import Engine, Request

    sampling = _sampling(temperature, top_k, top_p, min_p, seed)
    directory = resolve_drafter(drafter, target)
    model, loaded, tokenizer = _load(resolve_model(target), directory, dtype, device, draft_weights)
    tokens = tokenizer.encode(prompt) if raw else encode(tokenizer, Prompt.user(prompt))
    request = Request(tokens, max_new_tokens, sampling=sampling)
    length = len(tokens) + max_new_tokens
    engine = Engine(model, loaded, max_length=length, adaptive=adaptive)
    if not compare:
        stream = None if as_json else _TextStream(tokenizer)
        result = engine.generate([request], stream)[0]
        if as_json:
            print_json(_outcome(result, tokenizer))
        else:
            sys.stdout.write("\n")
            errors.print(f"τ {result.acceptance_length:.2f}, {len(result.tokens)} tokens")
        return
    plain = Engine(model, None, max_length=length)
    with errors.status("running with and without the drafter"):
        found = compare_runs(engine, plain, request, repeats)
    facts = {**_outcome(found.result, tokenizer), **found.facts(), **machine(model)}
    if as_json:
        print_json(facts)
    else:
        Console().print(facts["text"], markup=False, highlight=False)
        _print_comparison(facts)
    if found.equal is False and facts["dtype"] == "float32":
        raise DFlashError(
            "the text differs from the target's own in float32: that is a fault, please report it "
            "with the checkpoint and the prompt"
        )
    if found.equal is False:
        errors.print(
            f"note: at {facts['dtype']} a near tie can fall either way; --dtype float32 tells that "
            "from a fault",
            style="yellow",
        )


def _sampling(temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None) -> Any:
    from dflash_plugin.decoding.sampling import SamplingParams

    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)


class _TextStream:
    """Prints text as tokens come, holding back an unfinished character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.printed = 0

    def __call__(self, _: int, tokens: list[int]) -> None:
        self.tokens += tokens
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True).rstrip("\ufffd")
        sys.stdout.write(text[self.printed :])
        sys.stdout.flush()
        self.printed = len(text)


def _outcome(result: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "text": tokenizer.decode(result.tokens, skip_special_tokens=True),
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "tau": result.acceptance_length,
        "committed": result.committed,
    }


def _print_comparison(facts: dict[str, Any]) -> None:
    equal = {True: "yes, token for token", False: "NO", None: "sampled, not compared"}
    table = Table("", "with the drafter", "target alone")
    ours, alone = facts["tokens_per_second"], facts["plain_tokens_per_second"]
    table.add_row("tokens/s", f"{ours:.1f} ({ours / alone:.2f}×)", f"{alone:.1f}")
    table.add_row("target passes", str(len(facts["committed"])), str(len(facts["tokens"]) - 1))
    table.add_row("acceptance length τ", f"{facts['tau']:.2f}", "1")
    table.add_row("same text", equal[facts["equal"]], "")
    Console().print(table)


@app.command("eval")
@reports_errors
def evaluate(
    data: Annotated[list[Path], typer.Option(help="JSONL prompt set; repeatable.")],
    drafter: Annotated[
        Path | None, typer.Option(help="Drafter directory; the shipped one for smollm2.")
    ] = None,
    target: Annotated[str, typer.Option(help="Model directory, or smollm2.")] = "smollm2",
    limit: Annotated[int | None, typer.Option(help="Prompts per set.")] = None,
    max_new_tokens: int = 256,
    batch: int = 1,
    temperature: float = 0.0,
    seed: int | None = None,
    compare: Annotated[bool, typer.Option(help="Also run the target alone.")] = True,
    dtype: Dtype | None = None,
    draft_weights: DraftWeightsOption = Weights.checkpoint,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """τ per request, pooled and per position, and tokens/s with and without the drafter."""
    _quiet()
    from dflash_plugin.bench.evaluate import evaluate_set, machine
    from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model
    from dflash_plugin.prompts import encode, load_prompts
    from dflash_plugin.transformers import Engine

    sets = [(path, load_prompts(path, limit)) for path in data]
    sampling = _sampling(temperature, 0, 1.0, 0.0, seed)
    directory = resolve_drafter(drafter, target)
    model, loaded, tokenizer = _load(resolve_model(target), directory, dtype, device, draft_weights)
    longest = max(len(encode(tokenizer, p)) for _, prompts in sets for p in prompts)
    length = longest + max_new_tokens
    engine = Engine(model, loaded, max_batch=batch, max_length=length)
    plain = Engine(model, None, max_batch=batch, max_length=length) if compare else None
    table = Table("set", "prompts", "τ", "tokens/s", "alone", "equal", "accepted at 1..K")
    found = []
    for path, prompts in sets:
        with _counting(f"{path.name}: {len(prompts)} prompts") as count:
            result = evaluate_set(
                prompts[0].set_name,
                prompts,
                tokenizer,
                engine,
                plain,
                max_new_tokens,
                sampling,
                count,
            )
        found.append(result)
        table.add_row(
            result.set_name,
            str(result.prompts),
            f"{result.tau:.2f}",
            f"{result.tokens_per_second:.1f}",
            ""
            if result.plain_tokens_per_second is None
            else f"{result.plain_tokens_per_second:.1f}",
            "" if result.equal is None else f"{result.equal}/{result.prompts}",
            " ".join(f"{share:.2f}" for share in result.acceptance),
        )
    mean = sum(result.tau for result in found) / len(found)
    if as_json:
        sets_found = [result.model_dump() for result in found]
        facts = {"mean_tau": mean, "batch": batch, "draft_weights": draft_weights.value}
        print_json({**facts, **machine(model), "sets": sets_found})
    else:
        Console().print(table)
        Console().print(f"mean τ over {len(found)} sets: {mean:.2f}")


@app.command()
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
    _quiet()
    from dflash_plugin.bench.data import load_sets
    from dflash_plugin.bench.schema import Settings
    from dflash_plugin.bench.sweep import begin, check_settings, connect, sweep

    if output.exists() and not overwrite:
        raise DFlashError(
            f"{str(output)!r} is already there: give another --output, or --overwrite"
        )
    if not output.parent.is_dir():
        raise DFlashError(f"{str(output.parent)!r} is not a directory: make it, or change --output")
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
        thinking=None if thinking is None else thinking is Thinking.on,
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
        kept = f"{len(record.cells)} cells are in {output}" if record.cells else "nothing is kept"
        errors.print(f"stopped: {kept}, marked as incomplete", markup=False, highlight=False)
        raise typer.Exit(130) from None
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        _print_cells(record)
        errors.print(f"result written to {output}", markup=False, highlight=False)


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
    from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model

    if baseline not in (None, "alone"):
        raise DFlashError(
            f"--baseline is {baseline!r} and there is no URL to measure: give the server's URL "
            "first, or --baseline alone for the Transformers engine"
        )
    directory = resolve_drafter(drafter, target)
    model, loaded, tokenizer = _load(
        resolve_model(target), directory, dtype, device, Weights.checkpoint
    )
    endpoints = {
        "measured": EmbeddedEngine(model, tokenizer, loaded, target, adaptive, record_drafts)
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

    table = Table(
        "set", "in flight", "tokens/s", "baseline", "speedup", "τ", "TTFT", "TPOT ms", "counts"
    )
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
            shown(cell.ttft_ms.p50 if cell.ttft_ms else None, 0),
            shown(cell.tpot_ms.p50 if cell.tpot_ms else None, 1),
            "DIFFER" if False in agree else "agree" if True in agree else "untold",
        )
    Console().print(table)


@app.command()
@reports_errors
def report(
    results: Annotated[list[Path], typer.Argument(help="Results of `dflash-plugin bench`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page.")] = Path(
        "report.html"
    ),
) -> None:
    """Make one self-contained HTML page of measurements."""
    from dflash_plugin.bench.report import page
    from dflash_plugin.bench.schema import read_record

    text = page([read_record(path) for path in results])
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DFlashError(
            f"{str(output)!r} cannot be written ({error}): give another --output"
        ) from error
    errors.print(f"report written to {output}", markup=False, highlight=False)


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, list[int]], None]]:
    """A status line that counts tokens as they come."""
    written = 0
    with errors.status(what) as status:

        def count(_: int, tokens: list[int]) -> None:
            nonlocal written
            written += len(tokens)
            status.update(f"{what}, {written:,} tokens")

        yield count


def _load(
    target: Path, drafter: Path, dtype: Dtype | None, device: str | None, weights: Weights
) -> Any:
    import torch

    from dflash_plugin.transformers import load_drafter, load_target

    with errors.status("loading"):
        model, tokenizer = load_target(
            target, getattr(torch, dtype.value) if dtype else None, device
        )
        kind: Literal["fp8", "checkpoint"] = "fp8" if weights is Weights.fp8 else "checkpoint"
        return model, load_drafter(drafter, model, weights=kind), tokenizer


if __name__ == "__main__":
    app()
