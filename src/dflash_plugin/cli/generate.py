"""Commands that draft and verify with the Transformers engine: generate and eval."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from dflash_plugin.cli.common import (
    Device,
    DraftWeightsOption,
    Dtype,
    Json,
    console,
    counting,
    errors,
    load,
    print_json,
    quiet,
    reports_errors,
    resolve_pair,
)
from dflash_plugin.cli.other_load import OtherLoad
from dflash_plugin.errors import DFlashError

CHEAP_SECONDS = 20
"""A set that takes less is run three times."""


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
    draft_weights: DraftWeightsOption = "checkpoint",
    adaptive: Annotated[
        bool, typer.Option(help="Verify as many drafts as pay, none where none does.")
    ] = False,
    tree_rows: Annotated[
        str,
        typer.Option(
            help="Likely tokens that are verified beside the chain: a number, 0 for none, or auto, "
            "which is none without --adaptive."
        ),
    ] = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt; with --compare, show that the text is the target's own, and both speeds."""
    if not prompt.strip():
        raise DFlashError("the prompt is empty: write what to ask")
    if max_new_tokens < 1:
        raise DFlashError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    beside = _tree_rows(tree_rows)
    quiet()
    target_directory, directory = resolve_pair(target, drafter)
    from dflash_plugin.bench.evaluate import compare_runs, machine
    from dflash_plugin.decoding.sampling import SamplingParams
    from dflash_plugin.prompts import Prompt, encode
    from dflash_plugin.transformers import Engine, Request

    sampling = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    model, loaded, tokenizer = load(target_directory, directory, dtype, device, draft_weights)
    tokens = tokenizer.encode(prompt) if raw else encode(tokenizer, Prompt.user(prompt))
    if not tokens:
        raise DFlashError(
            f"the tokenizer of {target!r} makes no token of the prompt: check that the directory "
            "holds the tokenizer that the model was trained with"
        )
    request = Request(tokens, max_new_tokens, sampling=sampling)
    length = len(tokens) + max_new_tokens
    engine = Engine(
        model,
        loaded,
        max_length=length,
        adaptive=adaptive,
        tree_rows=beside,
    )
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
    others = OtherLoad()
    with errors.status("running with and without the drafter"):
        found = compare_runs(engine, plain, request, repeats)
    facts = {**_outcome(found.result, tokenizer), **found.facts(), **machine(model)}
    facts |= {
        "seconds": found.seconds,
        "plain_seconds": found.plain_seconds,
        "other_processes_cores": others.cores(),
    }
    if as_json:
        print_json(facts)
    else:
        console.print(facts["text"], markup=False, highlight=False)
        _print_comparison(facts)
    warn_if_busy(others, model)
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


def _tree_rows(given: str) -> int | Literal["auto"]:
    if given == "auto":
        return "auto"
    if not given.isdecimal():
        raise DFlashError(f"--tree-rows is {given!r}: give auto, or a number of rows, 0 for none")
    return int(given)


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
    seconds, alone, count = facts["seconds"], facts["plain_seconds"], len(facts["tokens"])
    table.add_row(
        f"tokens/s, median of {len(seconds)} (lowest to highest)",
        spread([count / each for each in seconds]),
        spread([count / each for each in alone]),
    )
    ratios = [theirs / ours for ours, theirs in zip(seconds, alone, strict=True)]
    table.add_row("speedup, run by run", spread(ratios, 2) + " ×", "")
    table.add_row("target passes", str(len(facts["committed"])), str(len(facts["tokens"]) - 1))
    table.add_row("acceptance length τ", f"{facts['tau']:.2f}", "1")
    table.add_row("same text", equal[facts["equal"]], "")
    console.print(table)


@reports_errors
def evaluate(
    data: Annotated[list[Path], typer.Option(help="JSONL prompt set; repeatable.")],
    drafter: Annotated[
        Path | None, typer.Option(help="Drafter directory; the shipped one for smollm2.")
    ] = None,
    target: Annotated[str, typer.Option(help="Model directory, or smollm2.")] = "smollm2",
    limit: Annotated[int | None, typer.Option(help="Prompts per set.")] = None,
    max_new_tokens: int = 256,
    batch: Annotated[int, typer.Option(help="Requests that run at once.")] = 1,
    temperature: float = 0.0,
    seed: int | None = None,
    compare: Annotated[bool, typer.Option(help="Also run the target alone.")] = True,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Timed runs of each set, with the drafter and alone in turns; by default 3 where "
            "one takes less than 20 seconds, otherwise 1.",
        ),
    ] = None,
    dtype: Dtype | None = None,
    draft_weights: DraftWeightsOption = "checkpoint",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """τ per request, pooled and per position, and tokens/s with and without the drafter."""
    quiet()
    from dflash_plugin.bench.evaluate import Evaluation, evaluate_set, machine
    from dflash_plugin.decoding.sampling import SamplingParams
    from dflash_plugin.prompts import encode, load_prompts
    from dflash_plugin.transformers import Engine

    if max_new_tokens < 1:
        raise DFlashError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    sets = [(path, load_prompts(path, limit)) for path in data]
    sampling = SamplingParams(temperature=temperature, seed=seed)
    target_directory, directory = resolve_pair(target, drafter)
    model, loaded, tokenizer = load(target_directory, directory, dtype, device, draft_weights)
    longest = max(len(encode(tokenizer, p)) for _, prompts in sets for p in prompts)
    length = longest + max_new_tokens
    engine = Engine(model, loaded, max_batch=batch, max_length=length)
    plain = Engine(model, None, max_batch=batch, max_length=length) if compare else None
    table = Table("set", "prompts", "runs", "τ", "tokens/s", "alone", "equal", "accepted at 1..K")
    found = []
    others = OtherLoad()
    for path, prompts in sets:
        runs: list[Evaluation] = []
        start = time.monotonic()
        wanted = repeats or 1
        while len(runs) < wanted:
            with counting(f"{path.name}: {len(prompts)} prompts, run {len(runs) + 1}") as count:
                runs.append(
                    evaluate_set(
                        prompts[0].set_name,
                        prompts,
                        tokenizer,
                        engine,
                        plain,
                        max_new_tokens,
                        sampling,
                        count,
                    )
                )
            if repeats is None and len(runs) == 1 and time.monotonic() - start < CHEAP_SECONDS:
                wanted = 3
        speeds = [run.tokens_per_second for run in runs]
        alone = [r.plain_tokens_per_second for r in runs if r.plain_tokens_per_second is not None]
        result = runs[0].model_dump()
        result["tokens_per_second"], result["runs_tokens_per_second"] = median(speeds), speeds
        if alone:
            result["plain_tokens_per_second"] = median(alone)
            result["runs_plain_tokens_per_second"] = alone
        found.append(result)
        table.add_row(
            result["set_name"],
            str(result["prompts"]),
            str(len(runs)),
            f"{result['tau']:.2f}",
            spread(speeds),
            spread(alone) if alone else "",
            "" if result["equal"] is None else f"{result['equal']}/{result['prompts']}",
            " ".join(f"{share:.2f}" for share in result["acceptance"]),
        )
    mean = sum(result["tau"] for result in found) / len(found)
    facts = {
        "mean_tau": mean,
        "batch": batch,
        "draft_weights": draft_weights,
        **machine(model),
        "other_processes_cores": others.cores(),
    }
    if as_json:
        print_json({**facts, "sets": found})
    else:
        console.print(table)
        console.print(f"mean τ over {len(found)} sets: {mean:.2f}")
        if any(len(result["runs_tokens_per_second"]) == 1 for result in found):
            console.print("a speed of one run has no spread: give --repeats to see it")
    warn_if_busy(others, model)


def spread(values: list[float], digits: int = 1) -> str:
    """Median of timed runs, and between what they lie."""
    shown = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return shown
    return f"{shown} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def warn_if_busy(others: OtherLoad, model: Any) -> None:
    """Say beside times that other processes took part of the processor meanwhile.

    Args:
        others: from before the first run.
        model: the target; on a GPU, one thread drives it.
    """
    import torch

    warning = others.warning(torch.get_num_threads() if model.device.type == "cpu" else 1)
    if warning:
        errors.print(f"note: {warning}", style="yellow", markup=False, highlight=False)
