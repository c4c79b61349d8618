"""The command that trains a drafter."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dflash_plugin.cli.common import Device, Json, errors, print_json, quiet, reports_errors
from dflash_plugin.errors import DFlashError


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
    weighting: Literal["exponential", "dpace"] = "exponential",
    gamma: float | None = None,
    dpace_alpha: float = 0.5,
    seed: int = 0,
    eval_every: int = 500,
    save_every: int = 500,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a drafter on what the target itself writes. Goes on where it was interrupted."""
    quiet()
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
        weighting=weighting,
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
